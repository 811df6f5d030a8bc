"""Image files of every kind: what a model is shown of them, against the arithmetic of their pixels, and
what prompts may hold beside them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

from controllers.data import DataConfig, PromptDataset
from tests.images.tiny import make_model, make_tokenizer, png, square
from workers.config import ModelConfig
from workers.images import ImageProcessor, ImageReference

SIZE = (56, 84)
"""Height and width."""
TEXT = {"type": "text", "text": "what color"}


def colors() -> NDArray[np.uint8]:
    """[height, width, 3]"""
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def greys() -> NDArray[np.uint8]:
    """[height, width]"""
    return np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)


def read(image: Image.Image, **options: Any) -> NDArray[np.int64]:
    """What a model is shown of the image as a PNG file: int64 [height, width, 3]."""
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    reference = ImageReference(encoded=file.getvalue())
    shown = np.asarray(reference.read()).astype(np.int64)
    assert reference.size() == shown.shape[:2]
    return shown


def on_white(values: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Each pixel mixed with white by its opacity."""
    share = alpha[..., None] / 255
    return values * share + 255 * (1 - share)


def test_grey_and_black_and_white() -> None:
    grey = greys()
    expected = np.repeat(grey[..., None], 3, 2)
    assert (read(Image.fromarray(grey)) == expected).all()
    bits = grey > 127
    assert (read(Image.fromarray(bits)) == np.where(bits, 255, 0)[..., None]).all()
    deep = grey.astype(np.uint16) * 256 + 77  # 16 bits a pixel
    assert (read(Image.fromarray(deep)) == expected).all()


def test_transparency_is_white() -> None:
    """What lies under a transparent pixel is never shown: files often have black there."""
    values, alpha = colors(), greys()
    shown = read(Image.fromarray(np.dstack([values, alpha])))
    assert np.abs(shown - on_white(values, alpha)).max() <= 1
    shown = read(Image.fromarray(np.dstack([values[..., 0], alpha])))
    assert np.abs(shown - on_white(values[..., :1], alpha)).max() <= 1


def test_palettes() -> None:
    """Pixels are numbers of colours, of which one may be transparent."""
    numbers = greys() % 3
    table = np.array([[255, 0, 0], [0, 200, 0], [1, 2, 3]])
    image = Image.new("P", SIZE[::-1])
    image.putdata(numbers.flatten().tolist())
    image.putpalette(table.flatten().tolist())
    assert (read(image) == table[numbers]).all()
    table[1] = 255
    assert (read(image, transparency=1) == table[numbers]).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    file, frames = io.BytesIO(), [Image.new("RGB", (40, 30), name) for name in ("red", "lime")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, format=kind, save_all=True, append_images=frames[1:], **options)
    shown = np.asarray(ImageReference(encoded=file.getvalue()).read())
    assert (shown == np.array([255, 0, 0])).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_largest_value_are_refused(dtype: type[np.generic]) -> None:
    """Pillow would cut them off at 255, which is a white or a black image."""
    file = io.BytesIO()
    Image.fromarray((greys() / 255).astype(dtype)).save(file, format="TIFF")
    reference = ImageReference(encoded=file.getvalue(), place="rows.jsonl, line 1")
    for ask in (reference.size, reference.read):
        with pytest.raises(ValueError, match=r"^rows\.jsonl, line 1: .*save it with 8 or 16 bits$"):
            ask()


def test_print_colours() -> None:
    """Four inks of a JPEG are the colours that they print."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 40)).convert("CMYK").save(file, "JPEG", quality=95)
    shown = np.asarray(ImageReference(encoded=file.getvalue()).read()).astype(int)
    assert np.abs(shown - np.array([200, 30, 40])).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs(orientation: int) -> None:
    """EXIF's eight orientations; the prompt has the tokens of the upright image."""
    values = colors()
    turns = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.swapaxes(0, 1),
        6: np.rot90(values, -1),
        7: values[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(values),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (read(Image.fromarray(values), exif=exif) == turns[orientation]).all()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def images(family: str, tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    path = make_model(tmp_path_factory.mktemp(family) / "model", family=family)
    return ImageProcessor(ModelConfig(path=str(path)))


def load(path: Path, images: ImageProcessor, family: str, *rows: dict[str, Any]) -> PromptDataset:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), answer_column=None)
    return PromptDataset.load(config, config.train, make_tokenizer(family), images=images)


def asked(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def test_sizes_of_every_kind(images: ImageProcessor, family: str, tmp_path: Path) -> None:
    """One pixel, a large photograph, several images and none: the prompt has the tokens that the pixels
    make."""
    sizes = [[(1, 1)], [(3000, 4000)], [(1, 199)], [(28, 28), (500, 30), (60, 60)], []]
    rows = []
    for row, each in enumerate(sizes):
        names = []
        for number, size in enumerate(each):
            square("red", *size).save(tmp_path / f"{row}-{number}.png")
            names.append({"type": "image", "image": f"{row}-{number}.png"})
        rows.append({"prompt": [asked(*names, TEXT)]})
    loaded = load(tmp_path / "rows.jsonl", images, family, *rows)
    for row, references in enumerate(loaded.all().objects("images")):
        made = [images.pixels(reference) for reference in references]
        ids = loaded.part(row, 0).tolist()
        assert ids.count(images.token_id) == sum(image.num_tokens for image in made)
        sizes_alone = [(image.grid, image.num_tokens) for image in map(images.extent, references)]
        assert sizes_alone == [(image.grid, image.num_tokens) for image in made]
        assert len(made) == len(sizes[row])


def test_too_thin_an_image_is_named(tmp_path: Path, model_path: Path) -> None:
    images = ImageProcessor(ModelConfig(path=str(model_path)))
    square("red", 2, 500).save(tmp_path / "thin.png")
    row = {"prompt": [asked({"type": "image", "image": "thin.png"}, TEXT)]}
    with pytest.raises(ValueError, match=r"thin\.png' is 500 x 2 pixels, which") as error:
        load(tmp_path / "rows.jsonl", images, "qwen2_5_vl", row)
    assert str(error.value).count("line 1") == 1
    assert "\n" not in str(error.value)


def test_images_in_every_turn(images: ImageProcessor, family: str, tmp_path: Path) -> None:
    """In the system's, in several of the user's, in the order in which they stand; by {bytes, path} of a
    parquet file too."""
    names = ["red", "green", "blue"]
    for name in names:
        square(name, 56, 56).save(tmp_path / f"{name}.png")
    parts = [{"type": "image", "image": f"{name}.png"} for name in names]
    messages = [
        asked(parts[0], TEXT, role="system"),
        asked(parts[1], TEXT),
        {"role": "assistant", "content": "red"},
        asked(TEXT, parts[2]),
    ]
    loaded = load(tmp_path / "rows.jsonl", images, family, {"prompt": messages})
    (references,) = loaded.all().objects("images")
    assert [Path(str(reference.path)).stem for reference in references] == names
    bare: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message["content"], list):
            content = "".join(
                "<image>" if part["type"] == "image" else part["text"]
                for part in message["content"]
            )
            bare.append({**message, "content": content})
        else:
            bare.append(message)
    column = [
        {"bytes": png(square("red", 56, 56)), "path": None},
        {"bytes": None, "path": str(tmp_path / "green.png")},
        {"bytes": png(square("blue", 56, 56)), "path": "elsewhere/blue.png"},
    ]
    row = {"prompt": bare, "images": column}
    hub = load(tmp_path / "rows.parquet", images, family, row)
    assert hub.part(0, 0).tolist() == loaded.part(0, 0).tolist()
    (stored,) = hub.all().objects("images")
    for one, other in zip(references, stored, strict=True):
        assert one.read().tobytes() == other.read().tobytes()


def test_texts_that_spell_the_tokens_of_images(
    images: ImageProcessor, family: str, tmp_path: Path
) -> None:
    """They would be taken for the image that follows them."""
    (tmp_path / "a.png").write_bytes(png(square("red", 56, 56)))
    token = images.family.token_text
    for text in (token, images.family.placeholder):
        content = [{"type": "text", "text": f"what {text}"}, {"type": "image", "image": "a.png"}]
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: .*leave (it|the pl)") as error:
            load(tmp_path / "rows.jsonl", images, family, {"prompt": [asked(*content)]})
        assert "\n" not in str(error.value)


def test_a_mark_whose_image_is_missing_is_named(
    images: ImageProcessor, family: str, tmp_path: Path
) -> None:
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": "<image>what color"}]}
    with pytest.raises(
        ValueError, match=r"line 1: 'images' is empty, and the messages have <image>"
    ):
        load(tmp_path / "rows.jsonl", images, family, row | {"images": []})
    # Without the column it is text, as in a question about HTML.
    assert load(tmp_path / "rows.jsonl", images, family, row).num_images == 0


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("data:image/png;base64,%%%", "is no data URL of an image"),
        ("data:image/png,abc", "it is not base64"),
        ("data:image/png;base64,aGVsbG8=", "can't be read as an image"),
        ("https://example.org/a.png", "download it"),
        ("s3://bucket/a.png", "there is no file"),
        ("", "give an image as a path"),
    ],
)
def test_addresses(tmp_path: Path, model_path: Path, url: str, problem: str) -> None:
    images = ImageProcessor(ModelConfig(path=str(model_path)))
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(ValueError, match=problem) as error:
        load(tmp_path / "rows.jsonl", images, "qwen2_5_vl", {"prompt": [asked(part, TEXT)]})
    assert "line 1" in str(error.value)
    assert "\n" not in str(error.value)
    good = {"url": "data:image/png;base64," + base64.b64encode(png(square("red", 9, 9))).decode()}
    row = {"prompt": [asked({"type": "image_url", "image_url": good}, TEXT)]}
    assert load(tmp_path / "good.jsonl", images, "qwen2_5_vl", row).num_images == 1
