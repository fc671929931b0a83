"""The live table follows each run of a sweep by the rows it writes."""

import json

from utils.engines import jobs as pool


def job(folder, name, state="running"):
    return pool.Job(name, 1, ["true"], folder / name, folder / f"{name}.txt", state)


def write(job, *rows):
    job.folder.mkdir(exist_ok=True)
    with open(job.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_words_shares_and_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "REFRESH", 0.0)
    jobs = [
        job(tmp_path, name, state)
        for name, state in (("a", "running"), ("b", "running"), ("c", "waiting"), ("d", "done"))
    ]
    jobs[3].accuracy = 88.5
    following = pool.Following()
    following.look(jobs)
    assert [following.words(one) for one in jobs] == ["task 1", "task 1", "waiting", "finished, last 88.50"]
    assert pool.seconds_left(jobs, following, 10.0, before=1) is None
    epoch = {"kind": "epoch", "task": 0, "phase": "func", "epoch": 1, "epochs": 5}
    task = {"kind": "task", "task": 0, "tasks": 4, "accuracy_seen": 0.75}
    write(jobs[0], epoch)
    write(jobs[1], epoch, task, {**epoch, "task": 1, "epoch": 2})
    with open(jobs[1].folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "task", "ta')  # a row in the middle of being written
    following.look(jobs)
    assert following.words(jobs[0]) == "task 1, func epoch 1 of 5"
    assert following.words(jobs[1]) == "task 2 of 4, func epoch 2 of 5, 75.00 so far"
    assert [following.share(one) for one in jobs] == [0, 0.25, 0, 1]
    assert pool.seconds_left(jobs, following, 10.0, before=1) == 10 / 0.25 * 2.75
    lines = pool.table(jobs, 61, 100, following)
    assert (
        lines[1] == "b, seed 1  task 2 of 4, func epoch 2 of 5, 75.00 so far" and lines[-1] == "1 of 4 runs ended, 1:01"
    )
    (jobs[1].folder / "metrics.jsonl").write_text(json.dumps(epoch) + "\n")  # cut back by a run that was resumed
    following.look(jobs)
    assert following.words(jobs[1]) == "task 1, func epoch 1 of 5"
    many = [job(tmp_path, f"m{n}", "waiting") for n in range(pool.MOST_RUNS + 1)]
    assert pool.table(many, 0, 100, following)[0].split() == ["cell", "done", "running", "failed", "last"]


def test_a_wrong_row_ends_nothing(tmp_path):
    one = job(tmp_path, "a")
    write(one, {"kind": "task", "task": 2}, ["no row"], {"no": "kind"})
    following = pool.Following()
    following.look([one])
    assert following.words(one) == "task 4" and following.share(one) == 0
