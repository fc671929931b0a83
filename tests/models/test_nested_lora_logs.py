"""What nested_lora logs of every merge, against the adapters themselves."""

import pytest
import torch

from backbone.adapters.consolidation import METHODS
from models.families import nested as nesting
from models.learner.layers import slot_inputs
from tests.helpers.nested import learn, logits, rows
from tests.helpers.toy import toy_stream


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_tells(method, activation, chain):
    if (method, activation) == ("ties", "relu"):
        return
    alpha = 0.5 if method == "ema" else 1.0
    learner = learn(
        chain(
            nested_lora_consolidation_method=method,
            nested_lora_consolidation_alpha=alpha,
            nested_lora_activation=activation,
        ),
        toy_stream(),
        3,
    )
    assert torch.isfinite(logits(learner)).all()
    found = rows(learner, "consolidation")
    assert [(r["task"], r["layer"]) for r in found] == [(t, n) for t in range(3) for n in (1, 2)]
    for r in found:
        assert (r["merged"], r["method"], r["alpha"], r["level"], r["expert"]) == (True, method, alpha, 1, 0)
        assert -1 <= r["cosine"] <= 1 and 0 < r["fast_share"] < 1 and r["error"] >= 0
        assert r["fast_share"] == pytest.approx(r["fast_output"] / (r["fast_output"] + r["slow_output"]))
        assert min(r["slow_norm"], r["fast_norm"], r["slow_norm_after"], r["fast_norm_after"]) > 0
        assert r["slow_output_after"] > 0 and r["fast_output_after"] == 0


def test_logged_sizes_against_the_adapters_themselves(chain):
    stream = toy_stream()
    learner = learn(chain(), stream, 1, consolidate=False)
    nested = learner.backbone.slots["1"]
    slow, fast = nested.slow, nested.fast[0]
    norms = [torch.cat([p.detach().flatten() for p in a.parameters()]).norm().item() for a in (slow, fast)]
    inputs = []
    hook = nested.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        learner.eval().backbone(next(iter(stream.task(0).train.batches(100, augment=False)))[0])
    hook.remove()
    x = inputs[0].flatten(0, 1)  # all 20 images fit into the sample
    a, b = (adapter(x).detach() for adapter in (slow, fast))
    learner.consolidate(stream.task(0))
    row = rows(learner, "consolidation")[0]
    assert [row["slow_norm"], row["fast_norm"]] == pytest.approx(norms, rel=1e-9)
    sizes = [y.square().sum(1).mean().sqrt().item() for y in (a, b)]
    assert [row["slow_output"], row["fast_output"]] == pytest.approx(sizes, rel=1e-9)
    assert row["cosine"] == pytest.approx(((a * b).sum() / a.norm() / b.norm()).item(), rel=1e-9)
    assert row["slow_output_after"] == pytest.approx((a + b).square().sum(1).mean().sqrt().item(), rel=1e-9)


def test_facts_of_every_pair_are_of_the_state_before_the_first_merge(chain):
    """The slower pair merges first and empties the middle level; the row of the faster pair must still tell what it held."""
    learner = learn(chain(nested_lora_levels=3), toy_stream(), 1)
    generator = torch.Generator().manual_seed(0)
    for adapter in learner.backbone.slots.values():
        adapter.use("combined")
        for part in adapter.adapters():
            with torch.no_grad():
                part.up_proj.weight.normal_(generator=generator)
    task = toy_stream().task(1)
    inputs = slot_inputs(learner, task, learner.layers)
    for layer, adapter in nesting.nested_of(learner, learner.layers).items():
        with torch.no_grad():
            slow, middle, fast = (nesting.size(part(inputs[layer])) for part in adapter.adapters())
        facts = nesting.merge(learner, task, f"again.{layer}", adapter, inputs[layer], where={"layer": layer})
        assert [(f["slow_output"], f["fast_output"]) for f in facts] == [(slow, middle), (middle, fast)]
        assert [f["fast_share"] for f in facts] == pytest.approx(
            [middle / (slow + middle + fast), fast / (slow + middle + fast)]
        )
