"""Texts and labels: TweetEval (GitHub's files or the hub's parquet), the demo's tweets, plain text files."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantlab.io.files import read_text

STANCES = ("stance_abortion", "stance_atheism", "stance_climate", "stance_feminist", "stance_hillary")
TASKS = ("emoji", "emotion", "hate", "irony", "offensive", "sentiment", *STANCES)
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # GitHub's names: the hub's
HUB_ID = "cardiffnlp/tweet_eval"
NAMES = {
    "emotion": ["anger", "joy", "optimism", "sadness"],
    "hate": ["not-hate", "hate"],
    "irony": ["non_irony", "irony"],
    "offensive": ["not-offensive", "offensive"],
    "sentiment": ["negative", "neutral", "positive"],
    **{task: ["none", "against", "favor"] for task in STANCES},
}
LIMA_ID, LIMA_FILE = "GAIR/lima", "train.jsonl"
DEMO_NAMES = ["negative", "neutral", "positive"]
DEMO_COUNTS = (1087, 768, 2345)  # negative, neutral, positive
DEMO_THRESHOLD = 0.5  # mean rating, of -4 to 4, at which a tweet counts as negative or positive

Labelled = tuple[list[str], np.ndarray, list[str]]


def load_tweeteval(
    task: str, split: str, root: str | os.PathLike[str] | None = None, *, local_files_only: bool = False
) -> Labelled:
    """Texts, labels int64 (N,), and names of the labels, of one TweetEval task (Barbieri et al. 2020).

    split: "train", "val" or "test". Looked for in `root` (a directory with <task>/<split>_text.txt and _labels.txt as
    in TweetEval's repository, or with <task>/<split>*.parquet as on the hub), or else in QUANTLAB_DATA and its
    `tweeteval`, or else in the Hugging Face cache, or else (unless `local_files_only`) on the hub.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, accepted: {', '.join(TASKS)}")
    split = {"validation": "val", "valid": "val"}.get(split, split)
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, accepted: {', '.join(SPLITS)}")
    files = tweeteval_files(task, split, root)
    if not files:
        tried = [str(folder / task) for folder in _roots(root)]
        files = [hub_file(task, split, tried, local_files_only=local_files_only)]
    return _read_parquet(files, task) if files[0].suffix == ".parquet" else _read_github(files, task)


def tweeteval_files(task: str, split: str, root: str | os.PathLike[str] | None = None) -> list[Path]:
    """The files of a split as GitHub (text, labels) or the hub (parquet) has them, in `root` or else in QUANTLAB_DATA;
    none where the latter has none, FileNotFoundError where `root` has none."""
    for folder in _roots(root):
        own = folder / task.replace("_", "/")  # stance/abortion: the hub's stance_abortion
        files = [own / f"{split}_{part}.txt" for part in ("text", "labels")]
        if not any(path.is_file() for path in files):
            files = sorted((folder / task).glob(f"{SPLITS[split]}*.parquet"))
        if files:
            return files
    if root is not None:
        raise FileNotFoundError(
            f"root: {root} holds neither {task}/{split}_text.txt nor {task}/{SPLITS[split]}*.parquet"
        )
    return []


def _roots(root: str | os.PathLike[str] | None) -> list[Path]:
    if root is not None:
        return [Path(root), Path(root) / "datasets"]  # the second: a clone of the repository
    data = os.environ.get("QUANTLAB_DATA")
    return [Path(data) / "tweeteval", Path(data) / "tweeteval" / "datasets", Path(data)] if data else []


def hub_file(task: str, split: str, tried: Sequence[str] = (), *, local_files_only: bool = False) -> Path:
    """The parquet file of one split of a task, from the Hugging Face cache or the hub. tried: where else it was looked
    for."""
    from quantlab.io.hub import download_data

    try:
        name = f"{task}/{SPLITS[split]}-00000-of-00001.parquet"
        return download_data(HUB_ID, name, local_files_only=local_files_only)
    except FileNotFoundError as error:
        looked = f"not in {', '.join(tried)}; " if tried else ""
        hint = "give the directory of TweetEval's files as root, or in QUANTLAB_DATA"
        raise FileNotFoundError(f"tweeteval {task} {split}: {looked}{error}; {hint}") from None


def _read_github(files: list[Path], task: str) -> Labelled:
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing")
    text, labels = files
    places = (text.parent / "mapping.txt", text.parents[1] / "mapping.txt")
    mapping = next((path for path in places if path.is_file()), None)
    texts, raw = read_lines(text), read_lines(labels)
    bad = next((i for i, line in enumerate(raw) if not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", line)), None)
    if bad is not None:
        raise ValueError(f"{labels}: line {bad + 1} is {raw[bad][:40]!r}, expected the number of a label")
    values = np.array([int(line) for line in raw], np.int64)
    names = _read_mapping(mapping) if mapping is not None else NAMES.get(task)
    return check_labelled(texts, values, names or [str(i) for i in range(20)], str(labels))


def _read_mapping(path: Path) -> list[str]:
    """Names from lines `number TAB name`."""
    names = {}
    for i, line in enumerate(read_lines(path)):
        number, _, name = line.partition("\t")
        if not number.strip().isdigit() or not name.strip():
            raise ValueError(f"{path}: line {i + 1} is {line[:40]!r}, expected a number, a tab and a name")
        names[int(number)] = name.strip()
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path}: numbers {sorted(names)}, expected 0 to {len(names) - 1}")
    return [names[i] for i in range(len(names))]


def _read_parquet(paths: list[Path], task: str) -> Labelled:
    import pyarrow
    import pyarrow.parquet

    texts: list[str] = []
    values: list[int] = []
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path, columns=["text", "label"])
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a parquet file with the columns text and label: {error}") from None
        texts += table.column("text").to_pylist()
        values += table.column("label").to_pylist()
    where = str(paths[0])
    if not all(isinstance(text, str) for text in texts) or not all(type(value) is int for value in values):
        raise ValueError(f"{where}: expected strings in text and integers in label, and none missing")
    return check_labelled(texts, np.array(values, np.int64), NAMES.get(task) or [str(i) for i in range(20)], where)


def check_labelled(texts: Sequence[str], labels: np.ndarray, names: list[str], where: str) -> Labelled:
    """The three, after checking that there is one label a text, each the number of a name."""
    if len(texts) != len(labels):
        raise ValueError(f"{where}: {len(labels)} labels for {len(texts)} texts")
    if not texts:
        raise ValueError(f"{where}: no texts")
    bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if bad.size:
        raise ValueError(f"{where}: label {labels[bad[0]]} of text {bad[0] + 1}, expected 0 to {len(names) - 1}")
    return list(texts), labels, names


def load_demo_tweets(*, local_files_only: bool = False) -> Labelled:
    """The demo's 4,200 tweets (Hutto and Gilbert, ICWSM 2014; 20 raters each), labels int64 (4200,), and their names:
    0 negative (mean rating <= -0.5), 1 neutral, 2 positive (>= 0.5)."""
    from quantlab.io.cache import fetch

    return parse_demo_tweets(fetch("demo-tweets", local_files_only=local_files_only))


def parse_demo_tweets(path: str | os.PathLike[str]) -> Labelled:
    """Lines `number TAB mean rating TAB text`; HTML entities in the text are undone."""
    texts, ratings = [], []
    for i, line in enumerate(read_lines(path)):
        parts = line.split("\t", 2)
        try:
            ratings.append(float(parts[1]))
            texts.append(html.unescape(parts[2]).strip())
        except (IndexError, ValueError):
            raise ValueError(f"{path}: line {i + 1} is {line[:40]!r}, expected a number, a rating and a text") from None
    rating = np.array(ratings)
    labels = 1 + (rating >= DEMO_THRESHOLD).astype(np.int64) - (rating <= -DEMO_THRESHOLD)
    counts = tuple(np.bincount(labels, minlength=3).tolist())
    if counts != DEMO_COUNTS:
        raise ValueError(f"{path}: {counts} negative, neutral and positive tweets, expected {DEMO_COUNTS}")
    return texts, labels, DEMO_NAMES


def split_indices(
    count: int, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[np.ndarray]:
    """Indices of a train, a validation and a test part: the same permutation for the same count and seed."""
    if count < 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(
            f"fractions: got {fractions} of {count}, expected three positive numbers that add up to 1, of 3 or more"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    first, second = round(count * fractions[0]), round(count * (fractions[0] + fractions[1]))
    return [np.sort(part) for part in np.split(order, [first, second])]


def lima_file(data: str | os.PathLike[str] | None = None, *, local_files_only: bool = False) -> Path:
    """The JSON-lines file of LIMA's training conversations (Zhou et al. 2023, arXiv:2305.11206).

    data: the file, or a directory that holds train.jsonl. None: QUANTLAB_DATA and its `lima`, then the Hugging Face
    cache, then (unless `local_files_only`) the hub, where the data set asks for a login and its licence's acceptance.
    """
    if data is not None:
        path = Path(data) / LIMA_FILE if Path(data).is_dir() else Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"data: {path}: no such file, expected LIMA's {LIMA_FILE} or its directory")
        return path
    root = os.environ.get("QUANTLAB_DATA")
    for folder in (Path(root) / "lima", Path(root)) if root else ():
        if (folder / LIMA_FILE).is_file():
            return folder / LIMA_FILE
    from quantlab.io.hub import download_data

    try:
        return download_data(LIMA_ID, LIMA_FILE, local_files_only=local_files_only)
    except FileNotFoundError as error:
        hint = f"accept its licence at huggingface.co/datasets/{LIMA_ID} and log in (hf auth login), or give the file"
        raise FileNotFoundError(f"data: {error}; LIMA is gated: {hint}, as data or in QUANTLAB_DATA") from None


def load_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file, for calibration and perplexity; ValueError where it is empty or not text."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"text: {path}: no such file")
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: holds {'only white space' if text else '0 bytes'}, expected text")
    return text


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Lines of a UTF-8 file, parted by line feeds alone (a tweet may hold other line breaks), without the last's."""
    text = read_text(path)
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
