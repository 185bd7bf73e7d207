# SPDX-License-Identifier: Apache-2.0
"""Data sets by name: what is read, what identifies it, and one clear line for whatever is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nimfast.data import load
from nimfast.errors import UserError

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]


def picture(value: int = 0, mode: str = "RGB", height: int = 4, width: int = 6) -> Image.Image:
    """A gradient, so that flips and transpositions show."""
    ramp = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3) + value
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, images: dict[str, Image.Image]) -> Path:
    for name, image in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root


def write_parquet(
    file: Path,
    images: Sequence[Any],
    labels: Sequence[Any],
    *,
    columns: tuple[str, str] = ("image", "label"),
    names: Sequence[str] | None = None,
    group: int = 2,
) -> Path:
    """Row groups of two rows, so that a handful of images spans several."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({columns[0]: list(images), columns[1]: list(labels)})
    if names:
        features = {columns[1]: {"names": list(names), "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, row_group_size=group)
    return file


def cells(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": png(picture(first + i)), "path": None} for i in range(count)]


def complaint(spec: str, split: str = "test") -> str:
    with pytest.raises(UserError) as caught:
        load(spec, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mnist", "digits, cifar10[:DIR], imagefolder:DIR, parquet:GLOB or hf:NAME"),
        ("", "unknown data ''"),
        ("digits:8x8", "take no options"),
        ("digits?size=16", "take no options"),
        ("imagefolder", "imagefolder:DIR"),
        ("imagefolder:/no/such/folder", "no folder /no/such/folder"),
        ("parquet", "parquet:GLOB"),
        ("parquet:/no/such/*.parquet", "no file matches /no/such/*.parquet"),
        ("hf", "hf:NAME"),
        ("imagefolder:x?crop=3", "unknown option 'crop'"),
        ("imagefolder:x?size=0", "not '0'"),
        ("imagefolder:x?size=big", "not 'big'"),
    ],
)
def test_bad_name(spec: str, expected: str) -> None:
    assert expected in complaint(spec)


def test_digits_by_name() -> None:
    assert load("digits").shape == (1, 32, 32)
    assert "validation" in complaint("digits", "no-such-split")


# --- folders ---------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    images = {"b/1.png": picture(1), "a/2.png": picture(2), "a/deep/3.png": picture(3)}
    data = load(f"imagefolder:{write_folder(tmp_path / 'birds', images)}", "train")
    assert (data.name, data.split, data.classes) == ("imagefolder:birds", "train", ("a", "b"))
    assert (len(data), data.shape) == (3, (3, 4, 6))
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    pixels, _ = data[2]
    expected = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1) / 255
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels, expected)
    assert torch.equal(data[-1][0], pixels)
    with pytest.raises(IndexError):
        data[3]


def test_folder_of_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a/1.png": picture(), "val/a/1.png": picture(9)})
    assert float(load(f"imagefolder:{tmp_path}", "val")[0][0][0, 0, 0]) == pytest.approx(9 / 255)
    assert "has no split 'test' but train, val" in complaint(f"imagefolder:{tmp_path}")
    # A folder that is itself a split serves any name.
    assert len(load(f"imagefolder:{tmp_path}/val", "test")) == 1


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"car/1.png": picture(), "train/1.png": picture()})
    assert load(f"imagefolder:{tmp_path}").classes == ("car", "train")


def test_empty_folder(tmp_path: Path) -> None:
    assert "no images in" in complaint(f"imagefolder:{tmp_path}")
    (tmp_path / "a").mkdir()
    assert "no images in" in complaint(f"imagefolder:{tmp_path}")


def test_unequal_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": picture(), "a/2.png": picture(height=5, width=7)})
    message = complaint(f"imagefolder:{tmp_path}")
    assert "4x6" in message and "5x7" in message and "2.png" in message and "?size=" in message
    assert load(f"imagefolder:{tmp_path}?size=3").shape == (3, 3, 3)


def test_unequal_sizes_beyond_those_looked_at_first(tmp_path: Path) -> None:
    images = {f"a/{i:02}.png": picture(height=5 if i == 1 else 4) for i in range(32)}
    data = load(f"imagefolder:{write_folder(tmp_path, images)}")
    assert data[2][0].shape == data.shape
    with pytest.raises(UserError, match="4x6.*5x6.*01.png"):
        data[1]


def test_size_is_the_imagenet_recipe(tmp_path: Path) -> None:
    from torchvision import transforms

    original = picture(height=40, width=50)
    write_folder(tmp_path, {"a/1.png": original})
    recipe = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
        ]
    )
    assert torch.equal(load(f"imagefolder:{tmp_path}?size=28")[0][0], recipe(original))


def test_not_an_image(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": picture()})
    (tmp_path / "a/2.png").write_text("hello")
    assert "2.png is not an image that can be read (unknown format)" in complaint(
        f"imagefolder:{tmp_path}"
    )
    whole = png(picture(height=64, width=64))
    (tmp_path / "a/2.png").write_bytes(whole[: len(whole) // 2])
    assert "2.png is not an image that can be read" in complaint(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("1", "png", 1),
        ("L", "png", 1),
        ("LA", "png", 1),
        ("P", "png", 3),
        ("RGBA", "png", 3),
        ("CMYK", "jpg", 3),
    ],
)
def test_colours(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    image = picture(mode=mode)
    write_folder(tmp_path, {f"a/1.{suffix}": image})
    pixels, _ = load(f"imagefolder:{tmp_path}")[0]
    assert pixels.shape == (channels, 4, 6)
    reference = np.array(image.convert("RGB"), dtype=np.float32) / 255
    # JPEG loses a little; everything else is exact.
    error = np.abs(pixels.permute(1, 2, 0).numpy() - reference).max()
    assert error <= (0.1 if suffix == "jpg" else 1e-6)


def test_16_bit_grayscale_keeps_its_depth(tmp_path: Path) -> None:
    values = np.array([[0, 1, 1000], [40000, 65534, 65535]], dtype=np.uint16)
    write_folder(tmp_path, {"a/1.png": Image.fromarray(values)})
    pixels, _ = load(f"imagefolder:{tmp_path}")[0]
    assert torch.equal(pixels[0], torch.from_numpy(values.astype(np.float32) / 65535))


def test_grayscale_among_colour(tmp_path: Path) -> None:
    """ImageNet has a few grayscale files; they become equal channels."""
    write_folder(tmp_path, {"a/1.png": picture(mode="L"), "a/2.png": picture()})
    pixels, _ = load(f"imagefolder:{tmp_path}")[0]
    assert pixels.shape == (3, 4, 6) and torch.equal(pixels[0], pixels[2])


def test_colour_among_grayscale_beyond_those_looked_at_first(tmp_path: Path) -> None:
    images = {f"a/{i:02}.png": picture(mode="RGB" if i == 1 else "L") for i in range(32)}
    data = load(f"imagefolder:{write_folder(tmp_path, images)}")
    with pytest.raises(UserError, match="01.png has colours"):
        data[1]


def test_folder_identity(tmp_path: Path) -> None:
    def identity(root: Path, split: str = "test", **changed: int) -> str:
        images = {f"a/{i}.png": picture(i) for i in range(3)}
        images |= {f"{name}.png".replace("_", "/"): picture(v) for name, v in changed.items()}
        return load(f"imagefolder:{write_folder(tmp_path / root / 'x', images)}", split).identity()

    same = identity(Path("one"))
    assert identity(Path("two")) == same  # wherever the folder lies
    others = [
        identity(Path("one"), "train"),
        identity(Path("three"), a_1=77),  # other pixels
        identity(Path("four"), a_3=3),  # one image more
        load(f"imagefolder:{tmp_path}/one/x?size=3").identity(),
    ]
    assert len({same, *others}) == 5


# --- parquet ---------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: Path, columns: tuple[str, str], struct: bool) -> None:
    images: list[Any] = cells(7) if struct else [cell["bytes"] for cell in cells(7)]
    labels, names = [0, 1, 2, 1, 0, 2, 1], ["cat", "dog", "emu"]
    for part, rows in (("a", slice(0, 5)), ("b", slice(5, 7))):
        file = tmp_path / "pets" / f"{part}.parquet"
        write_parquet(file, images[rows], labels[rows], columns=columns, names=names)
    data = load(f"parquet:{tmp_path}/pets/*.parquet")
    assert (data.name, data.classes, len(data)) == ("parquet:pets", tuple(names), 7)
    assert [data[i][1] for i in range(7)] == labels
    # The corner pixel is the image's own number: every row is found, in any order.
    for index in (6, 0, 4, 5, 3):
        assert round(float(data[index][0][0, 0, 0]) * 255) == index


def test_parquet_without_names_numbers_its_classes(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", cells(2), [0, 3])
    assert load(f"parquet:{file}").classes == ("0", "1", "2", "3")


def test_parquet_of_several_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", cells(3), [0, 0, 0])
    write_parquet(tmp_path / "validation-0.parquet", cells(2), [0, 0])
    assert len(load(f"parquet:{tmp_path}/*.parquet", "train")) == 3
    assert "has no split 'test' but train, validation" in complaint(f"parquet:{tmp_path}/*.parquet")
    assert len(load(f"parquet:{tmp_path}/val*.parquet", "test")) == 2


def test_parquet_question_mark_is_a_glob(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x1.parquet", cells(1), [0])
    assert load(f"parquet:{tmp_path}/x?.parquet").shape == (3, 4, 6)
    assert load(f"parquet:{tmp_path}/x?.parquet?size=2").shape == (3, 2, 2)


def test_parquet_survives_a_worker_process(tmp_path: Path) -> None:
    data = load(f"parquet:{write_parquet(tmp_path / 'x.parquet', cells(3), [0, 1, 2])}")
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[2][0], data[2][0])


def test_parquet_reads_again_what_left_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nimfast.data.parquet._CACHE_BYTES", 1)
    data = load(f"parquet:{write_parquet(tmp_path / 'x.parquet', cells(5), [0] * 5)}")
    assert [round(float(data[i][0][0, 0, 0]) * 255) for i in (4, 0, 2, 4)] == [4, 0, 2, 4]


@pytest.mark.parametrize(
    ("columns", "images", "labels", "expected"),
    [
        (("image", "class"), None, [0, 0], "has no label column (its columns: image, class)"),
        (("photo", "label"), None, [0, 0], "has no image column (its columns: photo, label)"),
        (("image", "label"), None, ["cat", "dog"], "column 'label' holds"),
        (("image", "label"), None, [0, None], "with missing values"),
        (("image", "label"), None, [0, -1], "label -1"),
        (("image", "label"), None, [0, 2], "label 2 names none of its 2 classes"),
        (("image", "label"), [b"GIF?", b"hello"], [0, 0], "row 0 of"),
        (("image", "label"), [1, 2], [0, 0], "holds no image bytes"),
        (("image", "label"), [], [], "has no images"),
    ],
)
def test_bad_parquet(
    tmp_path: Path,
    columns: tuple[str, str],
    images: list[Any] | None,
    labels: list[Any],
    expected: str,
) -> None:
    file = tmp_path / "x.parquet"
    given = cells(2) if images is None else images
    write_parquet(file, given, labels, columns=columns, names=["cat", "dog"])
    assert expected in complaint(f"parquet:{file}")


def test_bad_row_is_numbered_within_its_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", cells(3), [0, 0, 0])
    bad = [*cells(3), {"bytes": b"hello", "path": None}]
    write_parquet(tmp_path / "b.parquet", bad, [0, 0, 0, 0])
    assert f"row 3 of {tmp_path}/b.parquet is not an image" in complaint(
        f"parquet:{tmp_path}/*.parquet"
    )


def test_not_a_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_text("hello")
    assert "x.parquet is not a parquet file" in complaint(f"parquet:{tmp_path}/x.parquet")
    assert f"parquet:{tmp_path}/*.parquet" in complaint(f"parquet:{tmp_path}")


def test_parquet_files_of_different_data(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", cells(1), [0], names=["cat"])
    write_parquet(tmp_path / "b.parquet", cells(1), [0], names=["dog"])
    assert "different classes" in complaint(f"parquet:{tmp_path}/*.parquet")


def test_parquet_identity(tmp_path: Path) -> None:
    def identity(folder: str, first: int = 0, label: int = 1) -> str:
        file = tmp_path / folder / "x" / "x.parquet"
        write_parquet(file, cells(2, first), [0, label], names=["a", "b"])
        return load(f"parquet:{file}").identity()

    same = identity("one")
    assert identity("two") == same
    assert len({same, identity("three", first=1), identity("four", label=0)}) == 3


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    (tmp_path / "x.parquet").write_text("")
    for name in [module, *(loaded for loaded in sys.modules if loaded.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    message = complaint(f"parquet:{tmp_path}/x.parquet" if module == "pyarrow" else "hf:x")
    assert f"needs {module}" in message and "pip install 'nimfast[data]'" in message


# --- CIFAR-10 --------------------------------------------------------------------------------


def test_real_cifar10(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    if not (shared_data / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 in {shared_data}")
    data = load(f"cifar10:{shared_data / 'cifar10'}")
    assert (data.name, data.shape, list(data.classes)) == ("cifar10", (3, 32, 32), CIFAR10)
    pixels = torch.stack([data[i][0] for i in range(0, len(data), len(data) // 200)])
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    # CIFAR-10's published channel means; wrong scaling or channel order would miss them.
    means = pixels.mean((0, 2, 3))
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.03)

    monkeypatch.setenv("NIMFAST_DATA", str(shared_data))
    assert load("cifar10").identity() == data.identity()
    train = load("cifar10", "train")
    assert len(train) == 50_000 and train.identity() != data.identity()


def test_cifar10_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.arange(2 * 3072, dtype=np.uint32).reshape(2, 3072).astype(np.uint8)

    def write(name: str, entry: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(entry))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    test = write("test_batch", {"data": images, "labels": [3, 9]})
    meta = write("batches.meta", {"label_names": CIFAR10})
    # torchvision knows the real files by their sums; here it shall know these.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", test]])
    about = {"filename": "batches.meta", "key": "label_names", "md5": meta}
    monkeypatch.setattr(datasets.CIFAR10, "meta", about)

    data = load(f"cifar10:{tmp_path}")
    assert (data.shape, list(data.classes)) == ((3, 32, 32), CIFAR10)
    pixels, label = data[1]
    assert label == 9
    # The file holds each image channel by channel.
    assert torch.equal(pixels, torch.from_numpy(images[1]).reshape(3, 32, 32) / 255)
    assert load(f"cifar10:{folder}").identity() == data.identity()

    (folder / "test_batch").write_bytes(b"changed")
    assert "incomplete or damaged" in complaint(f"cifar10:{tmp_path}")


def test_no_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIMFAST_DATA", "elsewhere")
    message = complaint("cifar10")
    assert "elsewhere/cifar10, data/cifar10, data;" in message and "download=True" in message
    assert f"in {tmp_path};" in complaint(f"cifar10:{tmp_path}")
    assert "choose train or test" in complaint("cifar10", "val")


def test_cifar10_with_a_file_missing(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-00001-of-00003.parquet", cells(1), [0])
    assert "1 of 3 files" in complaint(f"cifar10:{tmp_path}")


# --- Hugging Face ----------------------------------------------------------------------------


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach {name} ({split}).\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert "(Couldn't reach someone/pets (test)); check" in complaint("hf:someone/pets")
    assert "split 'dev', cannot be loaded" in complaint("hf:someone/pets:dev")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    pets = datasets.Dataset.from_dict({"image": cells(3), "label": [0, 1, 1]}, features=features)
    (tmp_path / "pets").mkdir()
    pets.to_parquet(tmp_path / "pets" / "test-00000-of-00001.parquet")
    name = f"hf:{tmp_path}/pets"
    data = load(name)
    assert (data.name, data.split, data.classes) == (name, "test", ("cat", "dog"))
    assert [data[i][1] for i in range(3)] == [0, 1, 1]
    assert round(float(data[2][0][0, 0, 0]) * 255) == 2
    assert data.identity() == load(f"{name}:test").identity()
    assert "cannot be loaded" in complaint(name, "train")
