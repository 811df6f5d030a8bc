"""Rows with images: every way to give one comes to the same prompt, and mistakes are named."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoImageProcessor

from controllers.data import DataConfig, DemonstrationDataset, PairDataset, PromptDataset
from controllers.data.images import stored_reference
from controllers.data.sources import SourceRow
from tests.images.tiny import make_tokenizer, png, square
from workers.config import ModelConfig
from workers.images import ImageProcessor

CAT = square("red", 56, 84)
TEXT = {"type": "text", "text": "what color"}


@pytest.fixture(scope="module")
def images(model_path: Path) -> ImageProcessor:
    return ImageProcessor(ModelConfig(path=str(model_path)))


def load(path: Path, images: ImageProcessor | None, **settings: Any) -> PromptDataset:
    config = DataConfig(train=str(path), answer_column=None, **settings)
    return PromptDataset.load(config, config.train, make_tokenizer(), images=images)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_a_column_of_images_that_is_not_there(images: ImageProcessor, tmp_path: Path) -> None:
    """A mark would stay text, and nothing would say that the images were left out."""
    (tmp_path / "cat.png").write_bytes(png(CAT))
    marked = {"prompt": [{"role": "user", "content": "<image>what"}], "images": ["cat.png"]}
    plain = {"prompt": [{"role": "user", "content": "what"}]}
    path = write(tmp_path / "rows.jsonl", plain, marked)
    expected = r"line 2: 'imgs' is not among 'prompt', 'images', .*set data.images_column"
    with pytest.raises(ValueError, match=expected):
        load(path, images, images_column="imgs")
    assert len(load(path, images)) == 2


def test_every_way_to_give_an_image(
    images: ImageProcessor, model_path: Path, tmp_path: Path
) -> None:
    """Paths (beside the data's file, absolute), data URLs, OpenAI's parts, a column with {bytes,
    path} and marks in the text: the same tokens, as many as the processor of transformers makes
    patches for, and the same pixels."""
    (tmp_path / "cat.png").write_bytes(png(CAT))
    url = "data:image/png;base64," + base64.b64encode(png(CAT)).decode()
    ways = [
        {"prompt": asked({"type": "image", "image": "cat.png"}, TEXT)},
        {"prompt": asked({"type": "image", "image": str(tmp_path / "cat.png")}, TEXT)},
        {"prompt": asked({"type": "image", "image": url}, TEXT)},
        {"prompt": asked({"type": "image_url", "image_url": {"url": url}}, TEXT)},
        {"prompt": asked({"type": "image"}, TEXT), "images": ["cat.png"]},
        {"prompt": asked(TEXT), "images": "cat.png"},
        {"prompt": [{"role": "user", "content": "<image>what color"}], "images": ["cat.png"]},
    ]
    rows = load(write(tmp_path / "rows.jsonl", *ways), images)
    table = pyarrow.Table.from_pylist(
        [{"prompt": asked({"type": "image"}, TEXT), "images": [{"bytes": png(CAT), "path": None}]}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    hub = load(tmp_path / "rows.parquet", images)
    grid = AutoImageProcessor.from_pretrained(model_path, backend="pil")(images=[CAT])
    expected = int(grid["image_grid_thw"][0].prod()) // 4
    first = rows.part(0, 0).tolist()
    assert first.count(images.token_id) == expected == 6
    batch = rows.all()
    found = [*batch.objects("images"), *hub.all().objects("images")]
    for row, references in enumerate(found):
        ids = rows.part(row, 0) if row < len(rows) else hub.part(0, 0)
        assert ids.tolist() == first, row
        (reference,) = references
        assert reference.read().tobytes() == CAT.tobytes()
    assert "images" not in batch.objects("extras")[4]


def test_pictures_of_pil_are_taken() -> None:
    """Hub data sets and rows made in Python hold images of PIL."""
    stored = stored_reference("row 0", SourceRow("row 0", {}), CAT)
    assert base64.b64decode(stored["base64"]) == png(CAT)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": asked({"type": "image", "image": "dog.png"})}, "no file 'dog.png'"),
        ({"prompt": asked({"type": "image", "image": "https://x/y.png"})}, "download it"),
        ({"prompt": asked({"type": "image"}, TEXT)}, "1 place for images .* no column has any"),
        (
            {"prompt": asked({"type": "image"}), "images": ["a.png", "a.png"]},
            "1 place .* 'images' has 2;",
        ),
        ({"prompt": asked({"type": "image", "image": "a.txt"})}, "can't be read as an image"),
        ({"prompt": asked({"type": "image", "image": 3})}, "as a path, as bytes"),
        ({"prompt": asked({**TEXT, "text": "<|image_pad|>"})}, "0 images, and the chat template"),
        ({"prompt": "what color", "images": ["a.png"]}, "text_as_user_message"),
        ({"prompt": asked({"type": "video", "video": "a.mp4"})}, "only text and images"),
    ],
    ids=str,
)
def test_mistakes(
    images: ImageProcessor, tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    """One line that names the row and the fix, before anything starts."""
    (tmp_path / "a.png").write_bytes(png(CAT))
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match=problem) as error:
        load(write(tmp_path / "rows.jsonl", row), images)
    assert "rows.jsonl, line 1" in str(error.value)
    assert "\n" not in str(error.value)


def damaged(kind: str) -> bytes:
    """The bytes of an image that can't be used."""
    if kind == "bomb":  # the head of a PNG with 20,000 x 20,000 pixels
        size = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
        return png(CAT)[:12] + size + struct.pack(">I", zlib.crc32(size)) + png(CAT)[33:]
    buffer = io.BytesIO()
    CAT.save(buffer, format=kind)
    return buffer.getvalue()[:-40]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "bomb"])
@pytest.mark.parametrize("column", ["images", "prompt"])
def test_damaged_images(images: ImageProcessor, tmp_path: Path, kind: str, column: str) -> None:
    """A file that is cut short, and one that would fill the memory: one line with the row, the column
    and the file, before anything starts."""
    (tmp_path / "a.img").write_bytes(damaged(kind))
    row: dict[str, Any] = {"prompt": asked({"type": "image", "image": "a.img"})}
    if column == "images":
        row = {"prompt": asked({"type": "image"}), "images": ["a.img"]}
    with pytest.raises(ValueError, match=r"the image .*a\.img' can't be read as an image") as error:
        load(write(tmp_path / "rows.jsonl", row), images)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 1")
    assert str(error.value).count("line 1") == 1
    assert repr(column) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_that_is_damaged_during_the_run_is_named(
    images: ImageProcessor, tmp_path: Path
) -> None:
    """On the rank that reads it."""
    (tmp_path / "a.png").write_bytes(png(CAT))
    row = {"prompt": asked({"type": "image"}), "images": ["a.png"]}
    rows = load(write(tmp_path / "rows.jsonl", row), images)
    ((reference,),) = rows.all().objects("images")
    (tmp_path / "a.png").write_bytes(damaged("PNG"))
    with pytest.raises(ValueError, match=r"line 1: 'images': the image .* can't be read as an"):
        images.pixels(reference)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"line 1: 'images': the image .* can't be read as an"):
        images.pixels(reference)


def test_a_model_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(CAT))
    rows = write(tmp_path / "rows.jsonl", {"prompt": asked({"type": "image", "image": "a.png"})})
    with pytest.raises(ValueError, match="sees none; use one of qwen2_vl, qwen2_5_vl"):
        load(rows, None)


def test_demonstrations_and_pairs(images: ImageProcessor, tmp_path: Path) -> None:
    """The images of all turns up to the last that is learned, in order; none of their tokens is
    learned. Both rows of a pair have the prompt's images."""
    for number, color in enumerate(("red", "green")):
        (tmp_path / f"{number}.png").write_bytes(png(square(color, 28 * (1 + number), 28)))
    turns = []
    for number in range(2):
        image = {"type": "image", "image": f"{number}.png"}
        turns += [
            {"role": "user", "content": [image, TEXT]},
            {"role": "assistant", "content": "red"},
        ]
    config = DataConfig(train="-", messages_column="messages")
    path = write(tmp_path / "demonstrations.jsonl", {"messages": turns})
    rows = DemonstrationDataset.load(config, str(path), make_tokenizer(), images=images).all()
    assert [reference.size() for reference in rows.objects("images")[0]] == [(28, 28), (56, 28)]
    learned = rows.ragged("response_ids").values[rows.ragged("loss_mask").values]
    assert images.token_id not in learned.tolist()
    assert rows.ragged("prompt_ids").values.tolist().count(images.token_id) == 1
    assert rows.ragged("response_ids").values.tolist().count(images.token_id) == 2
    pair = {"prompt": turns[:1], "chosen": "red", "rejected": "blue"}
    path = write(tmp_path / "pairs.jsonl", pair)
    pairs = PairDataset.load(
        DataConfig(train="-"), str(path), make_tokenizer(), images=images
    ).all()
    assert [len(references) for references in pairs.objects("images")] == [1, 1]
