"""The column that has a row's images: the hub's two names, places in messages, models that see none."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from controllers.data import DataConfig, DemonstrationDataset, PairDataset, PromptDataset
from controllers.data.images import stored_reference
from controllers.data.sources import SourceRow
from controllers.data.tasks import TaskDataset
from tests.images.tiny import make_tokenizer, png, square
from workers.config import ModelConfig
from workers.images import ImageProcessor, ImageReference

MARKED = [{"role": "user", "content": "<image>what color"}]
PLAIN = [{"role": "user", "content": "what color"}]
IN_CONTENT = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
BARE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]


@pytest.fixture(scope="module")
def images(model_path: Path) -> ImageProcessor:
    return ImageProcessor(ModelConfig(path=str(model_path)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"{'ab'[number]}.png").write_bytes(png(square("red", 28, 28 * (1 + number))))
    return tmp_path


def load(folder: Path, images: ImageProcessor | None, *rows: Any, **settings: Any) -> PromptDataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), **{"answer_column": None, **settings})
    return PromptDataset.load(config, config.train, make_tokenizer(), images=images)


def refusal(folder: Path, images: ImageProcessor | None, *rows: Any, **settings: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        load(folder, images, *rows, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("prompt", [MARKED, PLAIN, BARE], ids=["mark", "no place", "part"])
def test_both_names_of_the_hub(folder: Path, images: ImageProcessor, prompt: Any) -> None:
    """`image` and `images`, with one image or a list: the same rows, and no column for the reward."""
    values: list[Any] = ["a.png", ["a.png"], {"path": "a.png", "bytes": None}]
    rows = [{"prompt": prompt, name: value} for value in values for name in ("image", "images")]
    loaded = load(folder, images, *rows)
    first = loaded.part(0, 0).tolist()
    assert first.count(images.token_id) == 1
    for row, references in enumerate(loaded.all().objects("images")):
        assert loaded.part(row, 0).tolist() == first
        assert [Path(reference.path).name for reference in references] == ["a.png"]
    assert loaded.column_names == set()


def test_a_hub_table_with_a_question(folder: Path, images: ImageProcessor) -> None:
    """{image, question, answer} in parquet, one row without an image."""
    stored = {"bytes": png(square("red", 56, 84)), "path": "x.png"}
    rows = [{"image": stored, "question": "what color", "answer": "red"}]
    rows.append({"image": None, "question": "how many", "answer": "two"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    config = DataConfig(
        train=str(folder / "rows.parquet"), prompt_column="question", text_as_user_message=True
    )
    loaded = PromptDataset.load(config, config.train, make_tokenizer(), images=images)
    assert [len(found) for found in loaded.all().objects("images")] == [1, 0]
    assert [loaded.part(row, 0).tolist().count(images.token_id) for row in range(2)] == [6, 0]
    assert loaded.column_names == {"answer"}


def test_images_that_are_named_twice(folder: Path, images: ImageProcessor) -> None:
    problem = refusal(folder, images, {"prompt": PLAIN, "image": "a.png", "images": ["b.png"]})
    assert "line 1: images are in 'images' and in 'image'; set data.images_column=image" in problem
    problem = refusal(folder, images, {"prompt": IN_CONTENT, "image": "b.png"})
    assert "'image' has 1 image beside the 1 in the messages" in problem
    chosen = load(
        folder,
        images,
        {"prompt": PLAIN, "image": "b.png", "images": ["a.png"]},
        images_column="image",
        columns=[],
    )
    ((reference,),) = chosen.all().objects("images")
    assert reference.path == str(folder / "b.png")


@pytest.mark.parametrize("kind", ["bytes and path", "list", "path"])
def test_images_in_a_column_of_another_name(
    folder: Path, images: ImageProcessor, kind: str
) -> None:
    """A model must not be asked about an image that it is not shown; a path is one where a mark says so."""
    stored = {"bytes": png(square("red", 28, 56)), "path": None}
    value = {"bytes and path": stored, "list": [stored], "path": "a.png"}[kind]
    for number, prompt in enumerate([MARKED, PLAIN]):
        path = folder / f"{number}.parquet"
        rows = [{"prompt": prompt, "picture": value}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        config = DataConfig(train=str(path), answer_column=None)
        if kind == "path" and prompt is PLAIN:
            assert PromptDataset.load(config, str(path), make_tokenizer(), images=images)
            continue
        with pytest.raises(ValueError, match=r"'picture' has images and is not read; set data\.im"):
            PromptDataset.load(config, str(path), make_tokenizer(), images=images)
        for name, count in (("picture", 1), (None, 0)):
            chosen = DataConfig(train=str(path), answer_column=None, images_column=name, columns=[])
            loaded = PromptDataset.load(chosen, str(path), make_tokenizer(), images=images)
            assert loaded.num_images == count


def test_other_values_are_left_alone(folder: Path, images: ImageProcessor) -> None:
    """Sounds have the hub's two keys too, and a row with images may have others for its reward."""
    sound = {"bytes": None, "path": "a.wav"}
    assert load(folder, images, {"prompt": PLAIN, "sound": sound}).num_images == 0
    target = {"bytes": None, "path": "b.png"}
    assert load(folder, images, {"prompt": IN_CONTENT, "target": target}).num_images == 1
    assert (
        load(folder, images, {"prompt": PLAIN, "image": "a.png", "target": target}).num_images == 1
    )


def test_rows_without_an_image_in_groups_of_columns(folder: Path, images: ImageProcessor) -> None:
    """Some writers make a group of two nulls of a row's missing image."""
    none = {"bytes": None, "path": None}
    part = [{"role": "user", "content": [{"type": "image", "image": none}]}]
    rows = [{"prompt": PLAIN, "image": none}, {"prompt": PLAIN, "picture": none}]
    rows.append({"prompt": part, "image": "a.png"})
    loaded = load(folder, images, *rows, columns=[])
    assert [len(found) for found in loaded.all().objects("images")] == [0, 0, 1]


def test_a_column_that_no_row_has(folder: Path, images: ImageProcessor) -> None:
    problem = refusal(folder, images, {"prompt": PLAIN}, images_column="pictures")
    assert problem.startswith("data.images_column is 'pictures', and no row of data.train has it")
    nested = {"prompt": PLAIN, "extra": {"pictures": ["a.png"]}}
    assert load(folder, images, nested, images_column="extra.pictures").num_images == 1


@pytest.mark.parametrize(
    ("text", "given", "numbers"),
    [
        ("<image><image>what", ["a.png"], "2 places for images .* 'images' has 1;"),
        ("<image>what", ["a.png", "b.png"], "1 place for images .* 'images' has 2;"),
        ("<image>what", None, "'images' is empty, and the messages have <image>"),
    ],
)
def test_other_numbers_of_marks_and_images(
    folder: Path, images: ImageProcessor, text: str, given: Any, numbers: str
) -> None:
    row = {"prompt": [{"role": "user", "content": text}], "images": given}
    good = {"prompt": MARKED, "images": "a.png"}
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{numbers}") as error:
        load(folder, images, good, row)
    assert "\n" not in str(error.value)


def test_files_are_named_once(folder: Path, images: ImageProcessor) -> None:
    """Those that are missing, and those that are no images, with what to do."""
    problem = refusal(folder, images, {"prompt": PLAIN, "image": "c.png"})
    assert problem.count("c.png") == 1
    assert problem.endswith("; correct the path")
    absolute = str(folder / "c.png")
    assert refusal(folder, images, {"prompt": PLAIN, "image": absolute}).count("c.png") == 1
    (folder / "c.png").write_text("no image")
    problem = refusal(folder, images, {"prompt": PLAIN, "image": "c.png"})
    assert problem.count("c.png") == 1
    assert problem.endswith("it is no image that Pillow knows; replace the file, or remove the row")


@pytest.mark.parametrize("prompt", [IN_CONTENT, BARE, MARKED], ids=["value", "part", "mark"])
@pytest.mark.parametrize("kind", [PromptDataset, DemonstrationDataset, PairDataset])
def test_models_that_see_none(folder: Path, kind: Any, prompt: Any) -> None:
    """Every kind of rows says that it is the model, and names families that see."""
    row = {
        "prompt": prompt,
        "response": "red",
        "chosen": "red",
        "rejected": "blue",
        "answer": "red",
    }
    if prompt is not IN_CONTENT:
        row["image"] = "a.png"
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    config = DataConfig(train=str(path))
    with pytest.raises(
        ValueError, match=r"line 1: .* and the model sees none; use one of qwen2_vl"
    ):
        kind.load(config, config.train, make_tokenizer())


def test_a_text_model_whose_column_is_something_else(folder: Path) -> None:
    """Agents' data sets have the names of containers there: a column of the reward's as ever."""
    loaded = load(folder, None, {"prompt": PLAIN, "image": "python:3.11"})
    assert loaded.column_values(0) == {"image": "python:3.11"}
    row = {"prompt": PLAIN, "image": "a.png"}
    assert "or set data.images_column=null to leave them out" in refusal(folder, None, row)
    assert load(folder, None, row, images_column=None).column_values(0) == {"image": "a.png"}


def test_environments_are_given_text(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"prompt": IN_CONTENT, "answer": "red"}))
    config = DataConfig(train=str(path))
    with pytest.raises(ValueError, match="environments show text alone; leave it out"):
        TaskDataset.load(config, config.train, make_tokenizer())


def test_pairs_of_whole_conversations(folder: Path, images: ImageProcessor) -> None:
    """Both begin with the same image, in bytes, which stands in two columns."""
    url = "data:image/png;base64," + base64.b64encode(png(square("red", 28, 28))).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    turn = {"role": "user", "content": [image, {"type": "text", "text": "what color"}]}
    row = {
        "chosen": [turn, {"role": "assistant", "content": "red"}],
        "rejected": [turn, {"role": "assistant", "content": "blue"}],
    }
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps(row))
    config = DataConfig(train=str(path))
    pairs = PairDataset.load(config, config.train, make_tokenizer(), images=images)
    assert [len(found) for found in pairs.all().objects("images")] == [1, 1]


def test_images_are_not_learned(folder: Path, images: ImageProcessor) -> None:
    """A model writes text alone: an assistant's turn with an image would be learned as its tokens."""
    turns = [*PLAIN, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]
    for row, settings in (
        ({"messages": turns}, {"messages_column": "messages"}),
        ({"prompt": PLAIN, "response": turns[1:]}, {}),
    ):
        path = folder / "rows.jsonl"
        path.write_text(json.dumps(row))
        config = DataConfig(train=str(path), **settings)
        with pytest.raises(ValueError, match="an assistant's turn with an image") as error:
            DemonstrationDataset.load(config, config.train, make_tokenizer(), images=images)
        assert "line 1" in str(error.value)


def test_equal_rows_are_duplicates(folder: Path, images: ImageProcessor) -> None:
    rows = [{"prompt": MARKED, "image": name} for name in ("a.png", "b.png", "a.png")]
    assert len(load(folder, images, *rows, remove_duplicates=True)) == 2


def test_pictures_of_pil_are_upright_and_in_rgb() -> None:
    """As of a file: turned photographs, and modes that PNG files do not have."""
    image = square("red", 28, 56)
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    for given, size in ((turned, (56, 28)), (image.convert("CMYK"), (28, 56))):
        stored = stored_reference("row 0", SourceRow("row 0", {}), given)
        reference = ImageReference(encoded=base64.b64decode(stored["base64"]))
        assert reference.size() == size
        assert reference.read().mode == "RGB"
    with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
        stored_reference("row 0", SourceRow("row 0", {}), image.convert("F"))
