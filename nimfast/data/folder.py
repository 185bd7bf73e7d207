# SPDX-License-Identifier: Apache-2.0
"""``imagefolder:DIR``: one folder per class, as torchvision and timm read it."""

from __future__ import annotations

from pathlib import Path

from nimfast.data.base import ImageDataset
from nimfast.data.decode import one_line
from nimfast.data.pictures import Options, PictureDataset
from nimfast.data.splits import NAMES, choose, part_of
from nimfast.errors import UserError


class FolderDataset(PictureDataset):
    """Images ``root/CLASS/...``; classes are numbered in sorted order, as torchvision does."""

    def __init__(self, root: Path, split: str, options: Options) -> None:
        from torchvision.datasets import ImageFolder

        try:
            found = ImageFolder(str(root))
        except FileNotFoundError as error:
            raise UserError(
                f"no images in {root} ({one_line(error)}); they must lie in one folder per class,"
                f" {root}/CLASS/IMAGE"
            ) from error
        self.root = root
        self.files = [Path(path) for path, _ in found.samples]
        labels = [label for _, label in found.samples]
        super().__init__(f"imagefolder:{root.name}", split, found.classes, labels, options)

    def _stored(self, index: int) -> bytes:
        return self.files[index].read_bytes()

    def _place(self, index: int) -> str:
        return str(self.files[index])

    def identity(self) -> str:
        """Covers every file's path below the folder and its size, and the bytes of 16 files."""
        listing = [f"{f.relative_to(self.root).as_posix()} {f.stat().st_size}" for f in self.files]
        probed = (self.files[index].read_bytes() for index in self._probed())
        return self._digest("\n".join(listing).encode(), *probed)


def load(argument: str, split: str, options: Options) -> ImageDataset:
    """Read ``DIR/SPLIT/CLASS/IMAGE`` where DIR has folders of splits, else ``DIR/CLASS/IMAGE``."""
    if not argument:
        raise UserError("imagefolder needs a folder; write imagefolder:DIR")
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {root}; write imagefolder:DIR with DIR/CLASS/IMAGE inside")
    # A split holds class folders; a class that happens to be called "train" holds files.
    splits = [name for name in NAMES if _has_folders(root / name)]
    chosen = choose(split, splits)
    if chosen is None:
        raise UserError(
            f"{root} has no split {split!r} but {', '.join(splits)};"
            f" name the folder to use, e.g. imagefolder:{root / splits[-1]}"
        )
    folder = root / chosen.stored if splits else root
    return part_of(FolderDataset(folder.resolve(), chosen.stored, options), chosen)


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())
