"""How far rounding alone may move what is solved from ill-conditioned statistics."""

import torch


def ridge_slack(ours, theirs):
    """Relative distance that rounding may put between the weights of two ridge heads; 0 where nothing is solved.

    `ours` and `theirs` are states with `statistics.gram` [P, P], `statistics.sums` [C, P] and `statistics.ridge` []. The
    weights solve (G + lambda I) W' = S'; with `statistics.shrinkage` (lda) the covariance within classes takes the place of
    G + lambda I. Entries that differ by a relative e move W by at most about 2 e times the condition number (Golub and Van
    Loan, Matrix Computations, section 2.6); twice that is allowed here.
    """
    gram = ours.get("statistics.gram")
    if gram is None or not gram.any():
        return 0.0
    identity = torch.eye(len(gram), dtype=gram.dtype)
    if (shrinkage := ours.get("statistics.shrinkage")) is None:
        matrix = gram + ours["statistics.ridge"] * identity
    else:
        counts = ours["statistics.counts"].clamp(min=1)
        within = gram - ours["statistics.sums"].T @ (ours["statistics.sums"] / counts[:, None])
        matrix = (1 - shrinkage) * within + shrinkage * within.diagonal().mean() * identity
    apart = len(gram) * torch.finfo(gram.dtype).eps * max(1.0, (gram.norm() / matrix.norm()).item())
    for name, size in (("statistics.gram", matrix), ("statistics.sums", ours["statistics.sums"])):
        apart += ((ours[name] - theirs[name]).norm() / size.norm()).item()
    return 4 * torch.linalg.cond(matrix).item() * apart
