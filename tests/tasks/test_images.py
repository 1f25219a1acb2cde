import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.tasks import DataSpec, images, load
from offramp.tasks.examples import Example, digest
from offramp.tasks.images import Image
from tests.selection import examples

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "vision"
"""Beside the checkout where it lies there."""
CLASSES = ("bird", "cat", "dog")
SMALL = {f"{label}/{number:02d}.jpg": b"%s %d" % (label.encode(), number) for label in CLASSES for number in range(40)}
"""Name -> bytes. Nobody decodes them here."""


def write_folder(folder, files=SMALL):
    for name, data in files.items():
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def write_zip(path, files=SMALL, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write(kind, place, files=SMALL):
    return write_zip(place.with_suffix(".zip"), files) if kind == "zip" else write_folder(place, files)


def load_images(train, dev=None, labels=None, split_seed=0):
    return load(DataSpec(train=train, dev=dev, labels=labels, split_seed=split_seed))


def contents(splits):
    """What the splits hold, wherever it lies."""
    return {name: [(image.read(), label) for image, label in found] for name, found in splits.examples.items()}


def below(folder, files=SMALL):
    return {f"{folder}/{name}": data for name, data in files.items()}


kinds = pytest.mark.parametrize("kind", ["folder", "zip"])


@kinds
@pytest.mark.parametrize("depth", ["", "train", "a/b c/train"])
def test_folders_and_zips_of_any_depth_give_the_same(tmp_path, kind, depth):
    files = below(depth) if depth else SMALL
    found = load_images(write(kind, tmp_path / "pets", files), None)
    assert (found.name, found.labels, found.metrics, found.cuts_dev) == ("pets", CLASSES, ("accuracy",), True)
    assert list(found.examples) == ["train", "tune", "certify", "dev"]
    assert contents(found) == contents(load_images(write_folder(tmp_path / "other"), None))
    everything = sorted(pair for pairs in contents(found).values() for pair in pairs)
    assert everything == sorted((data, CLASSES.index(name[:-7])) for name, data in SMALL.items())


@kinds
def test_a_dev_set_is_reported_and_never_trained_on(tmp_path, kind):
    dev = write(kind, tmp_path / "dev", {"val/dog/x.png": b"a dog"})
    found = load_images(write(kind, tmp_path / "train"), dev)
    assert contents(found)["dev"] == [(b"a dog", 2)]
    assert not found.cuts_dev
    assert sum(map(len, found.examples.values())) == len(SMALL) + 1


@kinds
def test_a_model_brings_the_order_of_its_labels_and_needs_no_train_set(tmp_path, kind):
    dev = write(kind, tmp_path / "dev", {"dog/x.png": b"x", "cat/y.PNG": b"y"})
    found = load_images(None, dev, labels=("dog", "emu", "cat"))
    assert found.labels == ("dog", "emu", "cat")
    assert contents(found) == {"dev": [(b"y", 2), (b"x", 0)]}
    with pytest.raises(UsageError, match=r"class 'dog' is none of cat, emu - .*dev.* - rename its folder"):
        load_images(None, dev, labels=("cat", "emu"))


def test_a_class_of_dev_that_train_lacks_is_named(tmp_path):
    dev = write_folder(tmp_path / "dev", {"cow/x.png": b"x"})
    with pytest.raises(UsageError, match=r"class 'cow' is none of bird, cat, dog - .*dev"):
        load_images(write_folder(tmp_path / "train"), dev)
    with pytest.raises(UsageError, match=r"class 'cow' is none of 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. - "):
        load_images(None, dev, labels=list(map(str, range(1000))))


@settings(deadline=None, database=None, max_examples=examples(25))
@given(
    copies=st.dictionaries(st.sampled_from(sorted(SMALL)), st.sampled_from(sorted(SMALL)), max_size=30),
    seed=st.integers(0, 3),
)
def test_equal_bytes_are_never_on_both_sides_and_other_names_move_nothing(tmp_path_factory, copies, seed):
    place = tmp_path_factory.mktemp("images")
    files = {**SMALL, **{f"{name[:-4]} copy.jpg": SMALL[source] for name, source in copies.items()}}
    before = contents(load_images(write_zip(place / "before.zip"), None, split_seed=seed))
    after = contents(load_images(write_zip(place / "after.zip", below("deep", files)), None, split_seed=seed))
    side = {data: name for name, pairs in before.items() for data, _ in pairs}
    assert {(data, name) for name, pairs in after.items() for data, _ in pairs} == set(side.items())


def test_the_seed_moves_images(tmp_path):
    place = write_folder(tmp_path / "pets")
    assert load_images(place, None).examples != load_images(place, None, split_seed=1).examples


def test_the_digest_of_images_is_that_of_their_bytes_and_labels(tmp_path):
    folder, archive = write_folder(tmp_path / "a"), write_zip(tmp_path / "b.zip")
    here, there = (load_images(place, None).examples["train"] for place in (folder, archive))
    assert here != there
    assert digest(here) == digest(there)
    assert digest(here) != digest([Example(image, (label + 1) % 3) for image, label in here])
    here[0].text.path.write_bytes(b"another picture")
    assert digest(here) != digest(there)


@kinds
def test_what_is_hidden_or_no_image_is_passed_over(tmp_path, kind):
    noise = {
        "README.txt": b"-",
        "cat/Thumbs.db": b"-",
        "cat/.hidden.jpg": b"-",
        ".git/cat/1.jpg": b"-",
        "__MACOSX/cat/._1.jpg": b"-",
        ".DS_Store": b"-",
        "cat/.cache/deep/1.jpg": b"-",
    }
    found = load_images(write(kind, tmp_path / "noisy", {**SMALL, **noise}), None)
    assert contents(found) == contents(load_images(write_folder(tmp_path / "clean"), None))


def test_an_image_says_where_it_lies_and_travels(tmp_path):
    file = load_images(write_folder(tmp_path / "pets"), None).examples["train"][0].text
    member = load_images(write_zip(tmp_path / "pets.zip"), None).examples["train"][0].text
    assert str(file) == str(tmp_path / "pets" / "bird" / file.path.name)
    assert str(member) == f"{tmp_path}/pets.zip/{member.member}"
    assert pickle.loads(pickle.dumps(member)) == member
    assert pickle.loads(pickle.dumps(member)).read() == file.read()


def test_a_zip_that_changed_is_opened_anew(tmp_path):
    path = write_zip(tmp_path / "pets.zip", {"cat/1.jpg": b"before"})
    image = Image(path, "cat/1.jpg")
    assert image.read() == b"before"
    write_zip(path, {"cat/1.jpg": b"afterwards"})
    assert image.read() == b"afterwards"
    write_zip(path, {"cat/2.jpg": b""})
    with pytest.raises(UsageError, match=r"images cannot be read \(.*no item named.*\) - .*pets.zip/cat/1.jpg"):
        image.read()


def test_a_fork_shares_no_position_in_the_zip(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "pets.zip")
    mine = images._archive(path)
    assert images._archive(path) is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert images._archive(path) is not mine


def test_few_zips_stay_open(tmp_path):
    for number in range(12):
        Image(write_zip(tmp_path / f"{number}.zip", {"cat/1.jpg": b"x"}), "cat/1.jpg").read()
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(tmp_path in path.parents for path in opened) == 4


def test_links_are_followed_and_circles_are_not(tmp_path):
    write_folder(tmp_path / "far")
    near = tmp_path / "near"
    near.mkdir()
    for label in CLASSES:
        (near / label).symlink_to(tmp_path / "far" / label)
        (tmp_path / "far" / label / "up").symlink_to(near)
    found = load_images(near, None)
    assert sum(map(len, found.examples.values())) == len(SMALL)


@kinds
@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"readme.txt": b"-"}, r"no images \(\.jpg, .*\) - .*bad.* - give a folder or a zip that has one folder"),
        ({}, r"no images "),
        ({"1.jpg": b"-", "2.jpg": b"-"}, r"image 1.jpg lies in no folder of a class - .*bad"),
        ({**SMALL, "logo.png": b"-"}, r"image logo.png lies in no folder of a class"),
        (below("cat", {"1.jpg": b"-", "2.jpg": b"+"}), r"the only class is 'cat' - .*bad.* - .* at least two"),
        ({**SMALL, "emu/": b""}, r"class 'emu' has no images - .*bad.* - add some, or remove its folder"),
        ({**below("t"), "t/emu/readme.txt": b"-"}, r"class 'emu' has no images"),
        (
            {**SMALL, "cat/kitten/1.jpg": b"-"},
            r"different places \(bird, cat/kitten\) - .*bad.* - give the folder that they lie in",
        ),
        ({**below("train"), **below("test")}, r"different places \(train/bird, test/bird\)"),
    ],
)
def test_another_layout_is_named(tmp_path, kind, files, match):
    (tmp_path / "bad").mkdir()
    with pytest.raises(UsageError, match=match):
        load_images(write(kind, tmp_path / "bad", files), None)


def test_an_empty_split_is_refused(tmp_path):
    few = {"cat/1.jpg": b"1", "dog/1.jpg": b"2"}
    with pytest.raises(UsageError, match=r"split \w+ of few is empty - .*few - give more data"):
        load_images(write_folder(tmp_path / "few", few), None)


def test_what_is_neither_a_folder_nor_a_zip_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no such file or folder - .*absent"):
        images.class_names(tmp_path / "absent")
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UsageError, match=r"not a whole zip \(.*\) - .*text.txt - get the data again"):
        images.class_names(tmp_path / "text.txt")
    path = write_zip(tmp_path / "torn.zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"not a whole zip \(.*\) - .*torn.zip"):
        load_images(path, None)


def patch(path, field, value, every=b"PK\x01\x02"):
    """Overwrite a field of each entry of a zip's directory: (offset, format)."""
    data = bytearray(path.read_bytes())
    position = data.find(every)
    while position >= 0:
        struct.pack_into(field[1], data, position + field[0], value)
        position = data.find(every, position + 4)
    path.write_bytes(data)
    return path


FLAGS, CRC, PACKED, SIZE = (8, "<H"), (16, "<I"), (20, "<I"), (24, "<I")


def test_encrypted_and_oddly_packed_members_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"image is encrypted - .*a.zip/bird/00.jpg - give a zip without a password"):
        load_images(patch(write_zip(tmp_path / "a.zip"), FLAGS, 1), None)
    with zipfile.ZipFile(write_zip(tmp_path / "c.zip"), "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("notes.txt", b"-")
        archive.writestr("__MACOSX/cat/._1.jpg", b"-")
    assert load_images(tmp_path / "c.zip", None).labels == CLASSES  # nobody reads these two
    with pytest.raises(UsageError, match=r"image is packed by method 14 - .*b.zip/bird/00.jpg - pack it with deflate"):
        load_images(write_zip(tmp_path / "b.zip", SMALL, zipfile.ZIP_LZMA), None)


def test_damaged_members_are_named(tmp_path):
    path = patch(write_zip(tmp_path / "a.zip"), CRC, 7)
    with pytest.raises(UsageError, match=r"image is damaged \(Bad CRC-32.*\) - .*a.zip/bird/00.jpg - get the data"):
        load_images(path, None)
    path = patch(write_zip(tmp_path / "b.zip"), FLAGS, 0x20)
    with pytest.raises(UsageError, match=r"images cannot be read \(compressed patched data.*\) - .*b.zip/bird/00.jpg"):
        load_images(path, None)
    path = write_zip(tmp_path / "c.zip", {"cat/1.jpg": bytes(range(256)) * 9})
    data = path.read_bytes()
    path.write_bytes(data[:50] + b"\xff" * 40 + data[90:])
    with pytest.raises(UsageError, match=r"images cannot be read \(Error -3 while decompressing.*c.zip/cat/1.jpg"):
        Image(path, "cat/1.jpg").read()
    path = write_zip(tmp_path / "d.zip", {"cat/1.jpg": b"short"}, zipfile.ZIP_STORED)
    patch(patch(path, PACKED, 999), SIZE, 999)
    with pytest.raises(UsageError, match=r"(read \(EOFError|damaged \(Overlap).* - .*d.zip/cat/1.jpg - get the"):
        Image(path, "cat/1.jpg").read()


def test_bombs_are_not_unpacked(tmp_path):
    bomb = write_zip(tmp_path / "bomb.zip", {**SMALL, "cat/bomb.png": bytes(images.MAX_FILE_BYTES + 1)})
    liar = patch(write_zip(tmp_path / "liar.zip", {"cat/bomb.png": bytes(64 << 20)}), SIZE, 100)
    tracemalloc.start()
    try:
        with pytest.raises(
            UsageError, match=r"image has more than 128\.0 MiB - .*bomb.zip/cat/bomb.png - make it smaller"
        ):
            load_images(bomb, None)
        with pytest.raises(UsageError, match=r"more than 128\.0 MiB"):
            Image(bomb, "cat/bomb.png").read()
        with pytest.raises(UsageError, match="image is damaged"):
            Image(liar, "cat/bomb.png").read()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_files_that_are_too_large_or_closed_are_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pets")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1 << 20)
    with (folder / "cat" / "large.jpg").open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(UsageError, match=r"image has more than 1.00 MiB - .*cat/large.jpg"):
        load_images(folder, None)
    with pytest.raises(UsageError, match=r"no such file or folder - .*absent.jpg"):
        Image(folder / "absent.jpg").read()


@pytest.mark.skipif(not DATA.is_dir(), reason="the data set does not lie beside the checkout")
def test_cifar_beside_the_checkout_loads():
    found = load_images(DATA / "cifar10_jpeg_train.zip", DATA / "cifar10_jpeg_test.zip")
    assert found.labels[:3] == ("airplane", "automobile", "bird")
    assert [len(found.examples[name]) for name in ("train", "tune", "certify", "dev")] == [40014, 4952, 5034, 10000]
    assert found.examples["dev"][-1] == (Image(DATA / "cifar10_jpeg_test.zip", "test/truck/0999.jpg"), 9)
