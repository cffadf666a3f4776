r"""Answers in \boxed{...}, compared with the reference as mathematics, by math-verify.

It uses signals, and may take long over an answer, so it works in a process of its own that is ended at a time limit.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
from typing import Any

LIMIT_S = 10.0  # a verdict,
START_S = 120.0  # and the import before the first
BOX = r"\boxed"
CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from tip_kernels.opd import boxed; boxed.serve()"


def score(completion: str, reference: str) -> float:
    """1 where what the completion's last box holds equals the reference; 0 without a box.

    Raises:
        TimeoutError: After LIMIT_S seconds.
        ValueError: What math-verify raised.
    """
    at = completion.rfind(BOX)
    return float(at >= 0 and _verifier.ask(completion[at:], reference))


def reads(reference: str) -> bool:
    """Whether math-verify finds anything in a reference."""
    try:
        return _verifier.ask(None, reference)
    except (TimeoutError, ValueError):
        return False


class _Verifier:
    """The process, which is started when it is first asked, and again after it was ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, completion: str | None, reference: str) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.close()
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, json.dumps(sys.path)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL,
                text=True,
            )  # fmt: skip
            self._answer(self.process, None, START_S)
        found = self._answer(self.process, [completion, reference], LIMIT_S)
        if isinstance(found, str):
            raise ValueError(found)
        return bool(found)

    def _answer(self, process: subprocess.Popen[str], question: Any, limit_s: float) -> Any:
        assert process.stdin and process.stdout
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            if question is not None:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it is gone
            self.close()
            raise TimeoutError(f"math-verify gave no verdict within {limit_s:g} s") from None
        except BaseException:  # Ctrl-C: the answer that is still to come is not the next question's
            self.close()
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_verifier = _Verifier()
atexit.register(_verifier.close)


def serve() -> None:
    """The process's part: a line of JSON for each line of JSON, a bool, or in words what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's
    answers, sys.stdout = sys.stdout, sys.stderr
    from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    def read(text: str) -> list[Any]:
        return parse(text, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)])

    print("true", file=answers, flush=True)
    for line in sys.stdin:
        completion, reference = json.loads(line)
        try:
            at = reference.rfind(BOX)
            gold = read(reference[at:] if at >= 0 else f"{BOX}{{{reference.strip()}}}")
            found: bool | str = bool(gold if completion is None else verify(gold, read(completion)))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps(found), file=answers, flush=True)
