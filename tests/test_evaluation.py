"""What a run is judged on, by whom and how surely; the rows of its files; options that shape its steps."""

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("transformers")

from tip_kernels import __main__ as command
from tip_kernels.inspect.usage import UsageError, install
from tip_kernels.opd import boxed, judges
from tip_kernels.opd.data import Row, key_of, read_rows, text_of
from tip_kernels.opd.judges import JUDGES, standard_error
from tip_kernels.opd.pair import load_pair
from tip_kernels.opd.rollout import sample
from tip_kernels.opd.settings import PACKAGED, Settings
from tip_kernels.opd.task import load_task, task_of
from tip_kernels.opd.train import Loop

CPU = torch.device("cpu")
SMALL = ["--batch", "4", "--eval-every", "2", "--no-report", "--quiet"]
SUMS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(100, 140)]
CHAT = "{% for turn in messages %}{{ turn.content }}{{ '+' if turn.role == 'system' else '=' }}{% endfor %}"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pair():
    return load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)


@pytest.fixture
def no_model(monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tip_kernels.opd.pair.load_pair", load)


def opd(*arguments):
    return command.main(["opd", *map(str, arguments)])


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def written(path, rows):
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MESSAGES = [{"role": "system", "content": "12"}, {"role": "user", "content": "34"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_a_file_are_read_as_they_stand_repeated_ones_too(suffix, tmp_path):
    path = written(tmp_path / f"rows{suffix}", [{"prompt": "1+1=", "answer": 2}, {"prompt": "1+1=", "answer": 2}])
    assert read_rows(path, "--task") == [Row("1+1=", "2")] * 2
    path = written(tmp_path / f"messages{suffix}", [{"prompt": MESSAGES}, {"prompt": MESSAGES}])
    assert read_rows(path, "--task") == [Row(MESSAGES)] * 2
    assert text_of(MESSAGES) == "system: 12\nuser: 34" and key_of(MESSAGES) != key_of(MESSAGES[1:]) == "34"


def test_only_the_end_of_a_line_ends_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "a\u2028b"}\r\n\n{"prompt": "c\x85d"}'.encode())
    assert read_rows(path, "--task") == [Row("a\u2028b"), Row("c\x85d")]
    path = path.rename(tmp_path / "rows.txt")
    path.write_text("a\x0cb\nc\n")
    assert read_rows(path, "--task") == [Row("a\x0cb"), Row("c")]


BAD_ROWS = {
    "an unknown key": ({"prompt": "1+1=", "solution": "2"}, "expected 'prompt' and perhaps 'answer', got 'solution'"),
    "no prompt": ({"question": "1+1=", "answer": "2"}, "expected 'prompt', got 'question', 'answer'"),
    "an answer that is a list": ({"prompt": "1+1=", "answer": ["2"]}, "expected an answer of text or a number, got"),
    "an answer that is a bool": ({"prompt": "1+1=", "answer": True}, "expected an answer of text or a number, got"),
    "no messages": ({"prompt": []}, r"expected a prompt of text or of messages .*, got \[\]"),
    "a message without a role": ({"prompt": [{"content": "1"}]}, 'expected .*, got a message {"content": "1"}'),
    "a message of another key": (
        {"prompt": [{"role": "user", "content": "1", "name": "x"}]},
        'expected .*, got a message .*"name"',
    ),
    "a message of no text": ({"prompt": [{"role": "user", "content": None}]}, "expected .*, got a message .*null"),
    "an answered chat": (
        {"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
        "expected messages that the assistant is to answer, got its own as the last",
    ),
}


@pytest.mark.parametrize("option", ["--task", "--eval-task"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_of_another_form_is_one_line_that_names_it(row, said, suffix, option, tmp_path, capsys, no_model):
    path = written(tmp_path / f"rows{suffix}", [row])
    assert opd(option, path, "--output", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(f"argument {option}: {re.escape(str(path))}.*: {said}", err), err


def test_a_file_that_is_no_parquet_and_parquet_without_its_library_are_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    path.write_text("prompt\n")
    assert opd("--task", path, "--output", tmp_path / "run") == 2
    assert re.search(r"argument --task: .*rows.parquet: expected a Parquet file, got .*\n$", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert opd("--task", path, "--output", tmp_path / "run") == 2
    assert capsys.readouterr().err.endswith(f"rows.parquet needs pyarrow: {install('data')}\n")


def test_rows_of_one_prompt_are_judged_by_their_own_answers_and_stand_on_one_side(tmp_path):
    rows = [{"prompt": f"{i % 10}=", "answer": str(i)} for i in range(30)]
    task = load_task(str(written(tmp_path / "rows.jsonl", rows)), 4)
    assert len(task.held_out) == 12 and len(task.listed) == 18 and not set(task.held_out) & set(task.listed)
    drawn = task.draw(random.Random(0), 18)
    assert sorted(drawn) == sorted(task.listed) and max(map(drawn.count, drawn)) == 3
    right = [[n for n in range(30) if task.judge(i, str(n), True)] for i in range(12)]
    assert all(len(answers) == 1 for answers in right) and len({answers[0] for answers in right}) == 12
    assert all(task.held_out[i] == f"{answers[0] % 10}=" for i, answers in enumerate(right))


def test_messages_go_through_the_chat_template_of_the_students_tokenizer(pair, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"argument --task: expected a tokenizer with a chat template .*'role'"):
        pair.encode([MESSAGES])
    with pytest.raises(UsageError, match=r"argument --chat: expected a tokenizer with a chat template .*'34'"):
        pair.encode(["34"], chat=True)
    pair.tokenizer.chat_template = CHAT
    assert pair.encode([MESSAGES, "12+34="]) == 2 * pair.encode(["12+34="])
    assert pair.encode([MESSAGES[1:], "34"], chat=True) == 2 * pair.encode(["34="])
    for role in ("teacher", "student"):
        pair.tokenizer.save_pretrained(shutil.copytree(PACKAGED / role, tmp_path / role))
    rows = [[{"role": "system", "content": str(i)}, {"role": "user", "content": str(i)}] for i in range(100, 110)]
    chats = written(tmp_path / "chats.jsonl", [{"prompt": row} for row in rows])
    models = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--steps", 1, *SMALL]
    assert opd(*models, "--task", chats, "--max-new-tokens", 48, "--output", tmp_path / "chats") == 0
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{i}+{i}=\n" for i in range(100, 110)))
    assert opd(*models, "--task", texts, "--max-new-tokens", 48, "--output", tmp_path / "texts") == 0
    assert log_of(tmp_path / "chats") == log_of(tmp_path / "texts")
    assert command.main(["inspect", str(tmp_path / "chats"), "--quiet"]) == 0
    assert "user: 10" in (tmp_path / "chats/inspect.html").read_text()


def test_what_another_task_is_judged_on_is_not_trained_on(tmp_path):
    own = str(written(tmp_path / "own.jsonl", SUMS))
    other = str(written(tmp_path / "other.jsonl", [*SUMS[:10], {"prompt": "5+5=", "answer": "10"}]))
    task = task_of(Settings(task=own, eval_task=other))
    assert task.held_out == [row["prompt"] for row in [*SUMS[:10], {"prompt": "5+5="}]] and task.both == 10
    assert list(task.listed) == [row["prompt"] for row in SUMS[10:]]
    assert set(task.draw(random.Random(0), 90)) == set(task.listed)
    assert task.judge(10, "10", True) == 1 and task.judge(0, "10", True) == 0
    some = task_of(Settings(task=own, eval_task=other, eval_prompts=3))
    assert len(set(some.held_out)) == 3 and set(some.held_out) < set(task.held_out)
    with pytest.raises(UsageError, match=r"argument --eval-prompts: expected at most the 11 prompts of .*, got 12"):
        task_of(Settings(task=own, eval_task=other, eval_prompts=12))
    with pytest.raises(UsageError, match=r"argument --eval-task: expected other prompts than those of .* all 40"):
        task_of(Settings(task=own, eval_task=own))
    addition = task_of(Settings(task="addition", eval_task=str(written(tmp_path / "one.jsonl", SUMS[:1]))))
    pairs = [prompt for seed in range(40) for prompt in addition.draw(random.Random(seed), 100)]
    first = load_task("addition", 1).draw(random.Random(0), 1)[0]
    seen = written(tmp_path / "drawn.jsonl", [{"prompt": first, "answer": "1"}])
    assert "100+100=" not in pairs
    assert task_of(Settings(eval_task=str(seen))).draw(random.Random(0), 1)[0] != first == pairs[0]


def test_an_evaluation_on_another_task_is_that_tasks_own(tmp_path):
    prompts = written(tmp_path / "sums.jsonl", SUMS)
    words = ["--steps", 1, *SMALL, "--eval-prompts", 8]
    assert opd(*words, "--output", tmp_path / "own") == 0
    assert opd(*words, "--task", prompts, "--eval-task", "addition", "--output", tmp_path / "other") == 0
    own, other = log_of(tmp_path / "own")[0], log_of(tmp_path / "other")[0]
    assert own == other and own["accuracy"] > 0  # the same student, prompts, judge and length
    prompts.write_text(prompts.read_text() + "\n")
    prompts.write_text(prompts.read_text().replace("278", "279"))
    assert opd("--resume", "--steps", 2, "--quiet", "--output", tmp_path / "other") == 2


def test_a_changed_file_of_an_evaluation_is_not_resumed(tmp_path, capsys):
    path = written(tmp_path / "sums.jsonl", SUMS[:8])
    words = ["--eval-task", path, "--judge", "exact", "--steps", 1, *SMALL, "--output", tmp_path / "run"]
    assert opd(*words) == 0
    assert opd("--resume", "--judge", "boxed", "--output", tmp_path / "run") == 2
    assert "argument --judge: expected 'exact', as the run to resume has it" in capsys.readouterr().err
    path.write_text(path.read_text().replace("214", "215"))
    assert opd("--resume", "--steps", 2, "--output", tmp_path / "run") == 2
    assert "which began with another task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "completion", "reference", "score"),
    [
        ("exact", " 42\n", "42", 1),
        ("exact", "so >42", "42", 0),
        ("exact", "42.0", "42", 0),
        ("rouge_l", "the cat sat", "the cat sat", 1),
        ("rouge_l", "cats sat there", "a cat sat", 2 / 3),  # stems of two words of three, in order
        ("rouge_l", "sat a cat", "a cat sat", 2 / 3),
        ("rouge_l", "dog", "a cat sat", 0),
        ("boxed", r"so \boxed{\frac{1}{2}}", "0.5", 1),
        ("boxed", r"\boxed{1} or rather \boxed{2}", "2", 1),
        ("boxed", r"\boxed{2} or rather \boxed{1}", "2", 0),
        ("boxed", "it is 42", "42", 0),
        ("boxed", r"\boxed{1234}", "1,234", 1),
        ("boxed", r"\boxed{x = 5}", "$5$", 1),
        ("boxed", r"\boxed{(1, 2)}", r"thus \boxed{(1,2)}", 1),
        ("boxed", r"\boxed{", "5", 0),
    ],
)
def test_judges_by_name_score_an_answer_beside_its_reference(judge, completion, reference, score):
    if JUDGES[judge].module:
        pytest.importorskip(JUDGES[judge].module)
    assert JUDGES[judge].score(completion, reference) == pytest.approx(score)


def test_a_boxed_answer_is_judged_in_any_thread_and_given_up_at_a_time_limit(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    found = []
    thread = threading.Thread(target=lambda: found.append(boxed.score(r"\boxed{5}", "5")))
    thread.start(), thread.join()
    before = boxed._verifier.process
    assert found == [1.0] and before.poll() is None and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    monkeypatch.setattr(boxed, "LIMIT_S", 0.5)
    began = time.perf_counter()
    os.kill(before.pid, signal.SIGSTOP)  # stands for an answer that takes for ever
    path = written(tmp_path / "one.jsonl", [{"prompt": str(i), "answer": "5"} for i in range(2)])
    monkeypatch.setitem(JUDGES, "boxed", judges.Judge(boxed.score))
    task = load_task(str(path), 1, "boxed")
    assert task.judge(0, r"\boxed{5}", True) == 0 and task.errors == {"TimeoutError": 1}
    assert time.perf_counter() - began < 5 and before.poll() is not None
    monkeypatch.undo()
    assert task.judge(0, r"\boxed{5}", True) == 1 and boxed._verifier.process is not before


def test_a_judge_takes_no_part_in_ctrl_c_and_ends_with_the_program():
    pytest.importorskip("math_verify")
    code = r"from tip_kernels.opd import boxed; print(boxed.score(r'\boxed{5}', '5'), boxed._verifier.process.pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    score, pid = done.stdout.split()
    assert score == "1.0" and done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert boxed.score(r"\boxed{5}", "5") == 1
    os.kill(boxed._verifier.process.pid, signal.SIGINT)
    before = boxed._verifier.process
    assert boxed.score(r"\boxed{6}", "6") == 1 and boxed._verifier.process is before


@pytest.mark.parametrize(
    ("judge", "package", "extra"),
    [
        ("boxed", "math-verify", "judges"),
        ("rouge_l", "rouge-score", "judges"),
        ("reasoning_gym", "reasoning-gym", "tasks"),
    ],
)
def test_a_judge_that_is_not_installed_is_one_line_before_a_model(
    judge, package, extra, tmp_path, capsys, no_model, monkeypatch
):
    monkeypatch.setitem(sys.modules, JUDGES[judge].module, None)
    path = written(tmp_path / "sums.jsonl", SUMS)
    for words in (["--task", path], ["--eval-task", path]):
        assert opd(*words, "--judge", judge, "--output", tmp_path / "run") == 2
        assert (
            capsys.readouterr().err
            == f"tip-kernels opd: error: argument --judge: {judge} needs {package}: {install(extra)}\n"
        )


BAD = {
    "unknown": (["--judge", "best"], "argument --judge: invalid choice: 'best'"),
    "its own": (["--judge", "exact"], "--judge: expected none beside addition, which has its own, got 'exact'"),
    "no answers": (["--task", "{texts}", "--judge", "exact"], "--judge: expected an answer in every row of .*texts"),
    "no gym": (["--task", "{sums}", "--judge", "reasoning_gym"], "--judge: expected reasoning_gym beside reaso"),
    "unreadable": (["--task", "{han}", "--judge", "rouge_l"], "--judge: .*: expected answers that the judge can"),
    "unreadable boxes": (["--task", "{han}", "--judge", "boxed"], "--judge: .*: expected answers that the judge can"),
    "no file": (["--eval-task", "nowhere.jsonl"], "argument --eval-task: expected addition, .* got 'nowhere.jsonl'"),
    "nothing": (["--eval-task", "{none}"], "--eval-task: expected at least one prompt in .*none.jsonl, got none"),
    "greedy samples": (["--eval-samples", "4"], "--eval-samples: expected 1 beside --eval-temperature 0, .* got 4"),
    "a cold answer": (["--eval-temperature", "-1"], "--eval-temperature: expected a .* at least 0, got '-1'"),
    "another schedule": (["--schedule", "linear"], "argument --schedule: invalid choice: 'linear'"),
    "growing weights": (["--weight-decay", "-0.1"], "--weight-decay: expected a .* at least 0, got '-0.1'"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_an_evaluation_that_cannot_be_is_one_line_before_a_model(words, said, tmp_path, capsys, no_model):
    judge = words[-1]
    if judge in JUDGES and JUDGES[judge].module:
        pytest.importorskip(JUDGES[judge].module)
    (tmp_path / "texts.txt").write_text("1+1=\n2+2=\n")
    written(tmp_path / "sums.jsonl", SUMS), written(tmp_path / "none.jsonl", [])
    written(tmp_path / "han.jsonl", [{"prompt": str(i), "answer": " "} for i in range(3)])
    names = {path.stem: path for path in tmp_path.iterdir()}
    assert opd(*(word.format(**names) for word in words), "--output", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(said, err), err


def test_the_standard_error_is_that_of_prompts_not_of_samples():
    rng = random.Random(0)
    means = [rng.random() for _ in range(50)]
    truth = statistics.stdev(means) / math.sqrt(50)
    assert standard_error(means, range(50)) == pytest.approx(truth)
    many = [mean for mean in means for _ in range(7)]
    assert standard_error(many, [i for i in range(50) for _ in range(7)]) == pytest.approx(truth)
    assert standard_error(many, range(350)) < 0.5 * truth
    assert standard_error([0.5, 1.0], ["a", "a"]) is None and standard_error([1.0, 1.0], "ab") == 0


def test_mean_at_k_is_the_mean_of_k_answers_drawn_at_the_temperature_asked_for(pair):
    settings = Settings(batch=16, eval_samples=8, eval_temperature=1.5, temperature=0.1, top_k=1)
    loop = Loop(settings, pair, load_task("addition", 24), CPU)
    row, again = loop.evaluate(), loop.evaluate()
    assert {**row, "seconds": 0} == {**again, "seconds": 0}
    how = {"max_new_tokens": 48, "stop_ids": pair.stop_ids, "pad_id": pair.pad_id, "temperature": 1.5}
    scores = []
    for first in (0, 8, 16):  # 4 * batch answers at a time
        prompts = loop.held_out[first : first + 8]
        seed = loop.seed(f"evaluation {first}")
        out = sample(pair.student.model, prompts, rollouts_per_prompt=8, seed=seed, **how)
        scores += loop.judge(out, [i for i in range(first, first + 8) for _ in range(8)])
    means = [statistics.fmean(scores[8 * i : 8 * i + 8]) for i in range(24)]
    assert row["accuracy"] == pytest.approx(statistics.fmean(means)) and len({*means}) > 3
    assert row["accuracy_se"] == pytest.approx(statistics.stdev(means) / math.sqrt(24))
    cold = Loop(Settings(batch=16, eval_samples=4, eval_temperature=1e-4), pair, load_task("addition", 24), CPU)
    greedy = Loop(Settings(batch=16), pair, load_task("addition", 24), CPU)
    assert cold.evaluate()["accuracy"] == greedy.evaluate()["accuracy"]


def test_a_run_names_its_judge_its_samples_and_its_standard_error(tmp_path, capsys):
    path = written(tmp_path / "sums.jsonl", SUMS[:8])
    words = ["--eval-task", path, "--judge", "exact", "--eval-samples", 4, "--eval-temperature", 0.7, "--steps", 1]
    assert opd(*words, "--batch", 4, "--json", "--output", tmp_path / "run") == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["eval_samples"] == 4 and result["judge"] == "exact" and result["end_accuracy_se"] == 0
    assert "temperature 0.7" in out and "accuracy, mean@4" in out and "standard error over prompts" in out
    assert "accuracy, mean@4, temperature 0.7" in (tmp_path / "run/report.html").read_text()


def test_rollouts_are_drawn_as_the_settings_say(pair):
    task = load_task("addition", 1)
    wild = Loop(Settings(batch=8, temperature=3.0), pair, task, CPU)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        loop = Loop(Settings(batch=8, temperature=3.0, **narrow), pair, task, CPU)
        prompts = pair.encode(task.draw(random.Random(loop._seed("prompts")), 8))
        assert torch.equal(loop.rollouts().completions, loop.complete(prompts).completions)
        assert not torch.equal(wild.rollouts().completions[:, :20], loop.rollouts().completions[:, :20])


def test_weight_decay_takes_its_share_of_every_weight(monkeypatch):
    after = []
    for decay in (0.0, 0.25):
        pair = load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)
        before = [weight.detach().clone() for weight in pair.student.model.parameters()]
        settings = Settings(batch=4, weight_decay=decay, lr=1e-2, warmup=0)
        loop = Loop(settings, pair, load_task("addition", 1), CPU)
        loop.step()
        after.append([weight.detach().clone() for weight in loop.weights])
    for plain, decayed, weight in zip(*after, before, strict=True):
        torch.testing.assert_close(plain - decayed, 1e-2 * 0.25 * weight, rtol=1e-3, atol=1e-6)


def test_a_cosine_falls_from_the_end_of_the_warmup_and_is_what_the_optimizer_uses(pair):
    settings = Settings(batch=2, steps=10, warmup=2, lr=1.0, schedule="cosine")
    rates = [settings.lr_at(step) for step in range(10)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    from transformers import get_cosine_schedule_with_warmup

    theirs = get_cosine_schedule_with_warmup(optimizer, 2, 10)
    for step in range(10):  # whose first step is at a rate of 0
        wanted = [0.5, 1.0][step] if step < 2 else theirs.get_last_lr()[0]
        assert rates[step] == pytest.approx(wanted)
        optimizer.step(), theirs.step()
    constant = Settings(steps=10, warmup=2, lr=1.0)
    assert [constant.lr_at(step) for step in range(10)] == [0.5] + 9 * [1.0]
    loop = Loop(Settings(batch=2, steps=10, warmup=2, lr=1e-9, schedule="cosine"), pair, load_task("addition", 1), CPU)
    for rate in rates[:4]:
        loop.step()
        assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(1e-9 * rate)


OPTIONS = ["--weight-decay", 0.1, "--top-p", 0.9, "--top-k", 4, "--rollouts-per-prompt", 2, "--micro-batch", 3]
OPTIONS += ["--temperature", 1.3, "--eval-samples", 2, "--eval-temperature", 0.8, "--eval-prompts", 8]


def test_a_resumed_run_of_these_options_repeats_an_unbroken_one_bit_for_bit(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--steps", 4, "--schedule", "cosine", "--warmup", 1, *OPTIONS, *SMALL]
    assert opd(*options, "--output", whole) == 0
    learn = Loop._learn

    def pressed(loop, *losses):
        if loop.counters.step == 2:
            signal.raise_signal(signal.SIGINT)
        return learn(loop, *losses)

    monkeypatch.setattr(Loop, "_learn", pressed)
    assert opd(*options, "--output", broken) == 130
    monkeypatch.undo()
    assert opd("--resume", "--steps", 6, "--output", broken) == 2
    assert "argument --steps: expected 4, as the run to resume has it, got 6" in capsys.readouterr().err
    assert opd("--resume", "--weight-decay", 0.2, "--output", broken) == 2
    assert opd("--resume", "--quiet", "--output", broken) == 0
    for name in ("student/model.safetensors", "checkpoint-000004/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert log_of(whole)[:3] == log_of(broken)[:3] and log_of(whole)[4]["accuracy"] == log_of(broken)[4]["accuracy"]
    assert log_of(whole)[3]["loss"] == log_of(broken)[3]["loss"]


def test_a_run_from_before_these_options_goes_on(tmp_path):
    assert opd("--steps", 1, "--eval-prompts", 8, *SMALL, "--output", tmp_path) == 0
    newer = {"schedule", "weight_decay", "eval_task", "judge", "eval_samples", "eval_temperature"}
    newer |= {"start_accuracy_se", "end_accuracy_se"}
    for path in (tmp_path / "run.json", tmp_path / "checkpoint-000001/state.json"):
        stored = json.loads(path.read_text())
        assert newer & stored.keys()
        if "origin" in stored:
            stored["origin"]["settings"] = {k: v for k, v in stored["origin"]["settings"].items() if k not in newer}
        path.write_text(json.dumps({name: value for name, value in stored.items() if name not in newer}))
    assert opd("--resume", "--steps", 2, "--quiet", "--output", tmp_path) == 0
    assert opd("--resume", "--weight-decay", "0.1", "--output", tmp_path) == 2
