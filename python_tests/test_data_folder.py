"""ImageFolder: any folder of images, with what cannot be read named and skipped."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from dse_ext.data import ImageFolder, NoImagesError, UnreadableImageError


def save(path, colour=(10, 20, 30), size=(20, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def test_images_are_found_in_sub_folders_in_a_fixed_order(tmp_path):
    for name in ("b/2.PNG", "a.jpg", "b/1.bmp", "c/d/3.webp"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    folder = ImageFolder(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in folder.paths]
    assert names == ["a.jpg", "b/1.bmp", "b/2.PNG", "c/d/3.webp"]
    assert len(folder) == 4
    assert folder[1].size == (20, 16)


def test_every_mode_becomes_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "I;16", "1", "CMYK"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode.replace(';', '')}.{suffix}")
    folder = ImageFolder(tmp_path)
    assert [folder[i].mode for i in range(len(folder))] == ["RGB"] * 6


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    save(tmp_path / "turned.jpg", size=(20, 10), exif=exif)
    assert ImageFolder(tmp_path)[0].size == (10, 20)


def test_unreadable_image_is_named_and_the_next_one_taken(tmp_path):
    (tmp_path / "a.png").write_bytes(b"this is no image")
    whole = save(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "c.png", colour=(1, 2, 3))
    folder = ImageFolder(tmp_path)
    image, skipped = folder.load(0)
    assert image.getpixel((0, 0)) == (1, 2, 3)
    assert "a.png" in skipped[0]
    assert "b.jpg" in skipped[1]
    with pytest.warns(UserWarning, match="skipped: cannot read the image") as warned:
        assert np.array_equal(folder[0], image)
    assert [str(w.message).split(": ")[1].split("/")[-1] for w in warned] == ["a.png", "b.jpg"]
    with pytest.raises(UnreadableImageError, match=r"a\.png") as caught:
        folder.image(0)
    assert caught.value.path == tmp_path / "a.png"


def test_folder_without_a_readable_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(NoImagesError, match=r"none of the 1 images .* can be read.*a\.png"):
        ImageFolder(tmp_path).load(0)


def test_folder_without_images_says_what_was_looked_for(tmp_path):
    with pytest.raises(NoImagesError, match="it holds no file at all"):
        ImageFolder(tmp_path)
    (tmp_path / "video.mp4").touch()
    with pytest.raises(NoImagesError) as caught:
        ImageFolder(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert ".jpeg" in message
    assert ".png" in message
    assert "video.mp4" in message


def test_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(NotADirectoryError, match="missing does not exist"):
        ImageFolder(tmp_path / "missing")
    file = save(tmp_path / "file.png")
    with pytest.raises(NotADirectoryError, match=r"file\.png is a file"):
        ImageFolder(file)


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "real" / "x.png")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "set" / "link")
    os.symlink(tmp_path / "set", tmp_path / "set" / "circle")
    folder = ImageFolder(tmp_path / "set")
    assert [path.name for path in folder.paths] == ["x.png"]


def test_index_out_of_range(tmp_path):
    save(tmp_path / "x.png")
    folder = ImageFolder(tmp_path)
    assert folder[-1].size == (20, 16)
    with pytest.raises(IndexError, match="out of range for 1 images"):
        folder[1]
