"""METEOR, ROUGE-L and CIDEr by pycocoevalcap, as the E2E challenge's script has them.

All three read the words of the Stanford (Penn Treebank) tokenizer, and METEOR is a program of
its own: both are Java. Without Java, words could be found in another way, but the scores would
then be none that can be compared with a paper's, so there are none.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, TypeAlias

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_program
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

logger = logging.getLogger(__name__)

Texts: TypeAlias = dict[int, list[str]]
"""Texts by the number of their example, as pycocoevalcap's scorers take them."""

_TIMEOUT_S = 600.0
_DONE_S = 10.0


class JavaError(Exception):
    """A Java program failed; the message says which and how."""


@dataclass(frozen=True, slots=True)
class TokenisedPairs:
    """Predictions (one each) and references in the Stanford tokenizer's words."""

    predictions: Texts
    references: Texts

    @classmethod
    def of(cls, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> TokenisedPairs:
        """Tokenise predictions and the list of references of each.

        Raises:
            JavaError: the tokenizer failed.
        """
        flat = [*predictions, *(text for of_one in references for text in of_one)]
        words = iter(tokenised(flat))
        predicted = {number: [next(words)] for number in range(len(predictions))}
        expected = {
            number: [next(words) for _ in of_one] for number, of_one in enumerate(references)
        }
        return cls(predicted, expected)


def tokenised(texts: Sequence[str]) -> list[str]:
    """Return each text's words in lower case, without punctuation, one space between.

    By pycocoevalcap's copy of the tokenizer, but not by its `PTBTokenizer`, which writes into
    its own folder among the installed packages, where a user may not write, and which a line
    separator in a text throws out of step.

    Raises:
        JavaError: the tokenizer failed.
    """
    folder = Path(ptbtokenizer.__file__).parent
    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    try:
        done = subprocess.run(
            [*command, "-encoding", "UTF-8"],
            input=lines.encode(),
            cwd=folder,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaError(f"the Stanford tokenizer could not be run: {error}") from error
    found = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        raise JavaError(f"the Stanford tokenizer failed: {_last_line(done.stderr)}")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in found]


def meteor(pairs: TokenisedPairs) -> float:
    """Return METEOR 1.5 for English with normalised punctuation, from 0 to 1.

    By pycocoevalcap's copy of the program, but not by its `Meteor`, which never ends where the
    program fails. It takes a line for each pair and answers with what it counted; told all of
    these, it answers with the score of each pair, then with that of all together.

    Raises:
        JavaError: the program failed; it wants 2 GB of memory.
    """
    command = ["java", "-Xmx2G", "-jar", meteor_program.METEOR_JAR]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    counts = []
    with tempfile.TemporaryFile() as words, _started(command, words) as process:
        try:
            for number, (prediction,) in pairs.predictions.items():
                texts = [*pairs.references[number], prediction]
                counts.append(_answer(process, " ||| ".join(["SCORE", *texts])))
            scores = [_answer(process, " ||| ".join(["EVAL", *counts]))]
            scores += [_line(process) for _ in counts]
            return float(scores[-1])
        except (OSError, ValueError) as error:  # it ended, or said something that is no number
            process.kill()
            process.wait(_DONE_S)
            words.seek(0)
            raise JavaError(f"METEOR failed: {_last_line(words.read()) or error}") from error


@contextlib.contextmanager
def _started(command: Sequence[str], stderr: IO[bytes]) -> Iterator[Popen[bytes]]:
    """Yield METEOR's program, and leave neither it nor its pipes behind."""
    folder = Path(meteor_program.__file__).parent
    try:
        process = Popen(command, cwd=folder, stdin=PIPE, stdout=PIPE, stderr=stderr)
    except OSError as error:
        raise JavaError(f"METEOR could not be run: {error}") from error
    try:
        yield process
    finally:
        process.kill()
        process.wait(_DONE_S)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what it did not read any more
                pipe.close() if pipe else None


def _answer(process: Popen[bytes], question: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{question}\n".encode())
    process.stdin.flush()
    return _line(process)


def _line(process: Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def rouge_l(pairs: TokenisedPairs) -> float:
    """Return the mean F-measure (β = 1.2) of the longest common subsequence, from 0 to 1."""
    score, _ = Rouge().compute_score(pairs.references, pairs.predictions)
    return float(score)


def cider(pairs: TokenisedPairs) -> float:
    """Return CIDEr-D, from 0 to 10; document frequencies are those of the given references."""
    if not any(text for texts in pairs.references.values() for text in texts):
        return 0.0  # its scorer stumbles over references that are all punctuation
    score, _ = Cider().compute_score(pairs.references, pairs.predictions)
    return float(score)


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
