"""TweetEval in both layouts, the demo's tweets, text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantlab.io import datasets
from quantlab.io.datasets import load_demo_tweets, load_text, load_tweeteval, read_lines, split_indices

TEXTS = ["I love it 😀", "meh", "never\u2028again", "@user @user ok"]
LABELS = [2, 1, 0, 1]


def save_github(root: Path, task: str = "sentiment", split: str = "test", mapping: str | None = None) -> Path:
    folder = root / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_text.txt").write_text("".join(f"{text}\n" for text in TEXTS), "utf-8")
    (folder / f"{split}_labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    (folder / "mapping.txt").write_text("0\tnegative\n1\tneutral\n2\tpositive\n" if mapping is None else mapping)
    return root


def save_parquet(root: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    (root / "sentiment").mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "sentiment" / "validation-00000-of-00001.parquet")
    return root


def check(loaded: tuple[list[str], np.ndarray, list[str]]) -> None:
    texts, labels, names = loaded
    assert texts == TEXTS and labels.tolist() == LABELS and labels.dtype == np.int64
    assert names == ["negative", "neutral", "positive"]


def test_github_layout(tmp_path: Path) -> None:
    check(load_tweeteval("sentiment", "test", save_github(tmp_path)))
    check(load_tweeteval("sentiment", "test", save_github(tmp_path / "clone" / "datasets").parent))


def test_no_final_line_feed(tmp_path: Path) -> None:
    save_github(tmp_path)
    (tmp_path / "sentiment" / "test_text.txt").write_text("\n".join(TEXTS), "utf-8")
    check(load_tweeteval("sentiment", "test", tmp_path))


def test_parquet(tmp_path: Path) -> None:
    check(load_tweeteval("sentiment", "validation", save_parquet(tmp_path, {"text": TEXTS, "label": LABELS})))


def test_data_directory_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_github(tmp_path / "tweeteval")
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path))
    check(load_tweeteval("sentiment", "test"))


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        FileNotFoundError, match=r"tweeteval sentiment train: not in .* hub cannot be reached; give .* as root"
    ):
        load_tweeteval("sentiment", "train")


BAD = {
    "a label too large": ("test_labels.txt", "2\n1\n3\n1\n", "label 3 of text 3, expected 0 to 2"),
    "a negative label": ("test_labels.txt", "2\n1\n-1\n1\n", "label -1 of text 3"),
    "a label of 30 digits": ("test_labels.txt", "2\n1\n" + "9" * 30 + "\n1\n", "line 3"),
    "a label that is a word": ("test_labels.txt", "2\n1\npositive\n1\n", "line 3 is 'positive'"),
    "a blank label": ("test_labels.txt", "2\n\n0\n1\n", "line 2"),
    "too few labels": ("test_labels.txt", "2\n1\n", "2 labels for 4 texts"),
    "too few texts": ("test_text.txt", "a\n", "4 labels for 1 texts"),
    "no texts": ("test_text.txt", "", "4 labels for 0 texts"),
    "a mapping with a gap": ("mapping.txt", "0\ta\n2\tb\n", "expected 0 to 1"),
    "a mapping of words": ("mapping.txt", "a b\n", "line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    save_github(tmp_path)
    (tmp_path / "sentiment" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tweeteval("sentiment", "test", tmp_path)


def test_stance_lies_in_folders_of_its_own(tmp_path: Path) -> None:
    """As in TweetEval's repository: stance/abortion, and one mapping for the five targets."""
    folder = tmp_path / "stance" / "abortion"
    folder.mkdir(parents=True)
    (folder / "test_text.txt").write_text("a\nb\n")
    (folder / "test_labels.txt").write_text("2\n0\n")
    assert load_tweeteval("stance_abortion", "test", tmp_path)[2] == ["none", "against", "favor"]
    (tmp_path / "stance" / "mapping.txt").write_text("0\tnone\n1\tagainst\n2\tfor\n")
    texts, labels, names = load_tweeteval("stance_abortion", "test", tmp_path)
    assert (texts, labels.tolist(), names) == (["a", "b"], [2, 0], ["none", "against", "for"])


def test_missing_labels(tmp_path: Path) -> None:
    save_github(tmp_path)
    (tmp_path / "sentiment" / "test_labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_labels\.txt"):
        load_tweeteval("sentiment", "test", tmp_path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    save_github(tmp_path)
    (tmp_path / "sentiment" / "test_text.txt").write_bytes(b"ok\n\xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_tweeteval("sentiment", "test", tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": TEXTS}, "columns text and label"),
        ({"text": TEXTS, "label": ["a"] * 4}, "integers in label"),
        ({"text": TEXTS, "label": [2, None, 0, 1]}, "none missing"),
        ({"text": [1, 2], "label": [0, 1]}, "strings in text"),
        ({"text": TEXTS, "label": [0, 1, 2, 9]}, "label 9 of text 4"),
    ],
)
def test_bad_parquet(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_tweeteval("sentiment", "val", save_parquet(tmp_path, columns))


def test_damaged_parquet(tmp_path: Path) -> None:
    path = save_parquet(tmp_path, {"text": TEXTS, "label": LABELS}) / "sentiment" / "validation-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a parquet file"):
        load_tweeteval("sentiment", "val", tmp_path)


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task: got 'x', accepted: emoji"):
        load_tweeteval("x", "test", tmp_path)
    with pytest.raises(ValueError, match=r"split: got 'dev', accepted: train, val, test"):
        load_tweeteval("emoji", "dev", tmp_path)
    with pytest.raises(FileNotFoundError, match="root"):
        load_tweeteval("emoji", "test", tmp_path)


# ---- the demo's tweets -----------------------------------------------------------------------------------------------


def test_demo_tweets() -> None:
    try:
        texts, labels, names = load_demo_tweets()
    except ConnectionError as error:
        pytest.skip(f"the demo tweets cannot be had here: {error}")
    assert len(texts) == 4200 and names == ["negative", "neutral", "positive"]
    assert np.bincount(labels).tolist() == [1087, 768, 2345]
    assert not any("&amp;" in text or text != text.strip() for text in texts)


def test_demo_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tweets.txt"
    ratings = [-3.9, -0.5, -0.499999, 0.0, 0.4999, 0.5, 3.9]
    path.write_text("".join(f"{i}\t{r}\tA &amp; B\r\n" for i, r in enumerate(ratings)))
    monkeypatch.setattr(datasets, "DEMO_COUNTS", (2, 3, 2))
    texts, labels, _ = datasets.parse_demo_tweets(path)
    assert labels.tolist() == [0, 0, 1, 1, 1, 2, 2] and texts[0] == "A & B"
    monkeypatch.setattr(datasets, "DEMO_COUNTS", (1, 1, 1))
    with pytest.raises(ValueError, match=r"\(2, 3, 2\) negative, neutral and positive"):
        datasets.parse_demo_tweets(path)
    path.write_text("1\tgood\ttext\n")
    with pytest.raises(ValueError, match="line 1"):
        datasets.parse_demo_tweets(path)


def test_split_is_a_partition_and_stays_the_same() -> None:
    train, val, test = split_indices(4200)
    assert [len(part) for part in (train, val, test)] == [2940, 420, 840]
    assert sorted(np.concatenate([train, val, test]).tolist()) == list(range(4200))
    assert train[:5].tolist() == split_indices(4200)[0][:5].tolist() == [1, 2, 4, 5, 7]
    assert not np.array_equal(train, split_indices(4200, seed=1)[0])
    with pytest.raises(ValueError, match="fractions"):
        split_indices(4200, (0.5, 0.5, 0.5))


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_load_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n two \n", "utf-8")
    assert load_text(path) == "one\n\n two \n"
    path.write_text("one", "utf-8-sig")  # with a byte order mark, which is no text
    assert load_text(path) == "one" and read_lines(path) == ["one"]
    for content, message in ((b"", "0 bytes"), (b"\xff\xfe", "not UTF-8"), (b" \n", "white space")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.txt: .*{message}"):
            load_text(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_text(tmp_path / "b.txt")
