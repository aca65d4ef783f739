import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import json
import socket
import struct
import sys
import threading
import time

import numpy as np
import pytest
from conftest import PROJECT, small_settings

import config
import data
from config import ConfigError, Settings
from data import DataError, DataNotFound, Dataset


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """No file of any dataset on this machine."""
    monkeypatch.setattr(data, "_SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(config, "PROJECT", tmp_path / "project")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


@pytest.fixture
def no_network(no_data, monkeypatch):
    """No file of any dataset on this machine, and a download that fails at once."""

    def refuse(name):
        raise OSError("no network")

    monkeypatch.setattr(data, "_download", refuse)


# --- Shards ----------------------------------------------------------------------------------


def test_main_class_shards_by_hand():
    # Two classes, four nodes, 5 images a node of which H = 0.32, rounded, are of the main class.
    labels = np.array([0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
    settings = Settings(NUM_NODES=4, SAMPLES_PER_NODE=5, HETEROGENEITY=0.32)
    shards = data.main_class_shards(labels, settings, None)
    assert [shard.tolist() for shard in shards] == [
        [0, 1, 2, 4, 5],  # class 0: its images 0 and 1, and the other images 0-2
        [2, 4, 0, 1, 3],
        [3, 6, 7, 10, 11],  # class 0 again: its images 2 and 3, and the other images 3-5
        [5, 7, 6, 8, 9],
    ]


def test_main_class_shards_reach_as_far_as_the_data(digits):
    # 6,000 images a class, 400 a node: 15 nodes of each class fit, 151 nodes do not.
    assert len(data.make_shards(digits, Settings(NUM_NODES=150))) == 150
    with pytest.raises(ConfigError, match=r"SAMPLES_PER_NODE: got 500.* node 150 "):
        data.make_shards(digits, Settings(NUM_NODES=151))


def test_iid_shards_are_disjoint_and_even(digits):
    settings = Settings(SHARD_RULE="iid", NUM_NODES=20, SAMPLES_PER_NODE=3000)
    labels = np.repeat(np.arange(10), 6000)
    shards = data.make_shards(dataclasses.replace(digits, y_train=labels), settings)
    assert sorted(np.concatenate(shards).tolist()) == list(range(60_000))
    # Hypergeometric: 300 of each class expected, standard deviation 16.
    for shard in shards:
        counts = np.bincount(labels[shard], minlength=10)
        assert abs(counts - 300).max() < 5 * 16
    with pytest.raises(ConfigError, match=r"SAMPLES_PER_NODE: got 3001, .* 3000"):
        data.make_shards(digits, settings.replace(SAMPLES_PER_NODE=3001))


def test_dirichlet_shards(digits):
    def shares(alpha, seed=0):
        settings = Settings(SHARD_RULE="dirichlet", DIRICHLET_ALPHA=alpha, SEED=seed, NUM_NODES=50)
        shards = data.make_shards(digits, settings)
        assert all(len(shard) == 500 for shard in shards)
        assert len(set(np.concatenate(shards).tolist())) == 50 * 500
        return np.stack([np.bincount(digits.y_train[s], minlength=10) for s in shards]) / 500

    # A class share's variance under Dirichlet(alpha, ..., alpha) of C = 10 classes is
    # (C - 1) / (C^2 (C alpha + 1)): 0.09 / 2 at alpha 0.1, about 0.00009 at alpha 100.
    assert shares(0.1).var(axis=1).mean() == pytest.approx(0.045, rel=0.3)
    assert shares(100.0).var(axis=1).mean() < 0.0006
    assert (shares(0.1, seed=0) == shares(0.1, seed=0)).all()
    assert (shares(0.1, seed=0) != shares(0.1, seed=1)).any()


def test_dirichlet_shards_use_up_the_data():
    labels = np.repeat(np.arange(4), 25)
    settings = Settings(
        SHARD_RULE="dirichlet", DIRICHLET_ALPHA=0.01, NUM_NODES=10, SAMPLES_PER_NODE=10
    )
    shards = data.dirichlet_shards(labels, settings, config.stream(0, "shards"))
    assert sorted(np.concatenate(shards).tolist()) == list(range(100))


@pytest.mark.parametrize(
    "shards",
    [
        [np.arange(5)] * 3,
        [np.arange(5)] * 3 + [np.arange(0)],
        [np.ones(60_000, bool)] * 4,
        [np.array([0.5])] * 4,
        [np.array([60_000])] * 4,
        [np.array([-1])] * 4,
        [np.zeros((2, 2), int)] * 4,
    ],
)
def test_what_a_rule_makes_is_checked(digits, monkeypatch, shards):
    monkeypatch.setitem(data.SHARD_RULES, "mine", lambda labels, settings, rng: shards)
    with pytest.raises(ConfigError, match=r"SHARD_RULE: got . .*'mine'.* NUM_NODES = 4"):
        data.make_shards(digits, small_settings(SHARD_RULE="mine"))


# --- The bundled digits ----------------------------------------------------------------------


def test_digits(digits):
    assert digits.x_train.shape == (60_000, 28, 28)
    assert digits.x_train.dtype == digits.x_test.dtype == np.uint8
    assert np.bincount(digits.y_train).tolist() == [6000] * 10
    assert digits.verdict == "stand-in"
    # scikit-learn's 1,797 digits have 174 to 183 of a class; a fifth of each is 35 to 37.
    from sklearn.datasets import load_digits

    counts = np.bincount(load_digits().target)
    assert np.bincount(digits.y_test).tolist() == [round(0.2 * c) for c in counts]


def test_digits_test_images_are_untouched(digits):
    # Each test image is one original, enlarged by nothing but bilinear interpolation.
    from sklearn.datasets import load_digits

    originals = load_digits()
    # Bilinear at 2.5 times: output pixel i lies at input (i + 0.5) / 2.5 - 0.5, edges held.
    at = np.clip((np.arange(20) + 0.5) / 2.5 - 0.5, 0, 7)
    low = np.minimum(at.astype(int), 6)
    weights = np.zeros((20, 8))
    weights[np.arange(20), low] = 1 - (at - low)
    weights[np.arange(20), low + 1] = at - low
    enlarged = np.zeros((1797, 28, 28))
    enlarged[:, 4:24, 4:24] = weights @ (originals.images / 16) @ weights.T
    enlarged *= 255
    used = []
    for image, label in zip(digits.x_test, digits.y_test, strict=True):
        distance = np.abs(enlarged - image).max(axis=(1, 2))
        best = int(distance.argmin())
        assert distance[best] <= 0.51  # rounded to whole grey values
        assert originals.target[best] == label
        used.append(best)
    assert len(set(used)) == len(used)


def test_no_original_is_a_training_and_a_test_digit(monkeypatch):
    monkeypatch.setattr(data, "_distorted", lambda images, rng: images)
    plain = data.load_digits()
    parts = (plain.x_train, plain.x_test)
    training, test = ({image.tobytes() for image in part} for part in parts)
    assert (len(training & test), len(training | test)) == (0, 1797)


class Fixed:
    # A generator whose draws are constants, in the order of the calls.

    def __init__(self, *values):
        self.values = iter(values)

    def uniform(self, low, high, size):
        return np.full(size, next(self.values), float)


def test_distortions_by_hand():
    # In the order angle, scale, shear, shift: by whole pixels and right angles.
    image = np.zeros((1, 28, 28), np.float32)
    image[0, 10, 12:15] = [0.25, 0.5, 1.0]
    same = data._distorted(image, Fixed(0, 1, 0, 0))
    np.testing.assert_allclose(same, image, atol=1e-6)
    # Output (row, column) is taken from input (row + 2, column + 2).
    moved = data._distorted(image, Fixed(0, 1, 0, 2))
    np.testing.assert_allclose(moved[0, 8, 10:13], [0.25, 0.5, 1.0], atol=1e-5)
    assert moved.sum() == pytest.approx(1.75, abs=1e-4)
    # A quarter turn about the middle, 13.5: input (10, c) goes to output (27 - c, 10) or to its
    # opposite; as output (x, y) reads input (-y, x) about the middle, row 10 becomes column 10.
    turned = data._distorted(image, Fixed(90, 1, 0, 0))
    np.testing.assert_allclose(turned[0, [15, 14, 13], 10], [0.25, 0.5, 1.0], atol=1e-4)
    # Twice as large: the middle 14 rows and columns fill the picture.
    large = data._distorted(image, Fixed(0, 2, 0, 0))
    assert large.sum() == pytest.approx(4 * 1.75, rel=0.05)


def test_every_training_digit_is_distorted_in_its_own_way(digits):
    assert len({image.tobytes() for image in digits.x_train}) > 59_900


def test_digits_distortions_are_small_and_not_seeded_by_the_run(digits):
    # DATA_DIR changes nothing either.
    again = data.load(small_settings(SEED=5, DATA_DIR="nowhere"))
    assert again.sha256 == digits.sha256
    # The committed results are of these digits. Rounding differs between versions, in pixels alone.
    committed = PROJECT / "results" / "reference" / "digits-seed0" / "config.json"
    stored = json.loads(committed.read_text())["dataset"]["sha256"]
    for name in ("y_train", "y_test"):
        assert digits.sha256[name] == stored[name]
    # They keep about the same ink.
    ratio = digits.x_train.mean() / digits.x_test.mean()
    assert 0.95 < ratio < 1.05


# --- Files -----------------------------------------------------------------------------------

NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files(arrays, dotted=False, zipped=False):
    # The four IDX files' names and contents.
    files = {}
    for key, name in NAMES.items():
        content = idx_bytes(arrays[key])
        name = name.replace("-idx", ".idx") if dotted else name
        files[name + ".gz" * zipped] = gzip.compress(content, 1) if zipped else content
    return files


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_npz(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


@pytest.fixture
def arrays(monkeypatch):
    # A small dataset that takes MNIST's and Fashion-MNIST's places as the published one.
    rng = np.random.default_rng(0)
    made = {}
    for part, n in (("train", 30), ("test", 20)):
        made[f"x_{part}"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        made[f"y_{part}"] = rng.permutation(np.resize(np.arange(10, dtype=np.uint8), n))
    sums = {key: hashlib.sha256(idx_bytes(array)).hexdigest() for key, array in made.items()}
    monkeypatch.setattr(data, "_SHA256", {"mnist": sums, "fashion_mnist": sums})
    return made


def load_from(folder, name="mnist"):
    return data.load(Settings(DATASET=name, DATA_DIR=str(folder)))


@pytest.mark.parametrize("form", ["npz", "idx", "idx.gz", ".idx", ".idx.gz"])
@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("fashion_mnist", "."),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "fashion_mnist"),
    ],
)
def test_forms_and_folders(tmp_path, arrays, no_network, form, name, below):
    if form == "npz":
        write_npz(tmp_path / "here" / below / f"{name}.npz", arrays)
    else:
        dotted, zipped = form.startswith("."), form.endswith(".gz")
        write(tmp_path / "here" / below, idx_files(arrays, dotted, zipped))
    dataset = load_from(tmp_path / "here", name)
    for key, array in arrays.items():
        assert (getattr(dataset, key) == array).all()
    assert (dataset.name, dataset.verdict) == (name, "canonical")
    assert dataset.source in (f"{name}.npz", "here" if below == "." else below)


def test_other_spelling_of_the_archive(tmp_path, arrays, no_network):
    write_npz(tmp_path / "fashion-mnist.npz", arrays)
    assert load_from(tmp_path, "fashion_mnist").source == "fashion-mnist.npz"


def test_canonical_mnist(mnist_dir):
    dataset = load_from(mnist_dir)
    assert dataset.verdict == "canonical"
    assert (dataset.classes, dataset.input_shape) == (10, (28, 28, 1))


def test_canonical_fashion_mnist(mnist_dir):
    if not (mnist_dir / "fashion-mnist").is_dir():
        pytest.skip("no Fashion-MNIST there")
    dataset = load_from(mnist_dir, "fashion_mnist")
    assert dataset.verdict == "canonical"
    # Under MNIST's names, it is refused.
    with pytest.raises(DataError, match="got other labels, takes those of mnist"):
        load_from(mnist_dir / "fashion-mnist")


@pytest.mark.filterwarnings("ignore:.*published pixels")
def test_order_of_places(tmp_path, arrays, no_network):
    def place(folder, value):
        marked = dict(arrays, x_test=arrays["x_test"].copy())
        marked["x_test"][0, 0, 0] = value
        write_npz(tmp_path / folder / "mnist.npz", marked)

    def found(**settings):
        return data.load(Settings(DATASET="mnist", **settings)).x_test[0, 0, 0]

    place("system/mnist", 1)
    assert found() == 1
    place("project/data", 2)
    assert found() == 2
    place("named", 3)
    assert found(DATA_DIR=str(tmp_path / "named")) == 3
    # An empty folder is no mistake; the search goes on.
    (tmp_path / "empty").mkdir()
    assert found(DATA_DIR=str(tmp_path / "empty")) == 1


def test_data_dir_that_does_not_exist(tmp_path, arrays, no_network):
    write_npz(tmp_path / "system" / "mnist.npz", arrays)
    assert load_from("data").source == "mnist.npz"
    for folder in ("dat", str(tmp_path / "nowhere"), str(tmp_path / "system/mnist.npz")):
        with pytest.raises(ConfigError, match=f"DATA_DIR: got '{folder}'"):
            load_from(folder)
        with pytest.raises(ConfigError, match=f"DATA_DIR: got '{folder}'"):
            load_from(folder, "auto")


def test_other_pixels_and_other_labels(tmp_path, arrays):
    other = arrays["x_test"].copy()
    other[0, 0, 0] ^= 1
    write_npz(tmp_path / "pixels" / "mnist.npz", dict(arrays, x_test=other))
    with pytest.warns(UserWarning, match=str(tmp_path / "pixels" / "mnist.npz")):
        assert load_from(tmp_path / "pixels").verdict == "not canonical"
    # Even in another order: shards are taken in the dataset's order.
    path = tmp_path / "labels" / "mnist.npz"
    write_npz(path, dict(arrays, y_train=np.roll(arrays["y_train"], 1)))
    with pytest.raises(DataError, match=f"{path}: got other labels"):
        load_from(path.parent)


class Unpickled:
    # Leaves a trace when it is unpickled.
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_damaged_and_foreign_files_are_named(tmp_path, arrays):
    path = write_npz(tmp_path / "mnist.npz", arrays)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[1000] ^= 0xFF
    pickled = np.array([Unpickled()] * 3, dtype=object)
    for written in (
        content[: len(content) // 2],
        bytes(flipped),
        b"",
        b"<html>404</html>",
        {"x_train": arrays["x_train"]},
        dict(arrays, y_test=pickled),
        dict(arrays, x_test=arrays["x_test"].astype(float)),
        dict(arrays, x_train=arrays["x_train"][:-1]),
        dict(arrays, x_train=arrays["x_train"][:, :8, :8]),
    ):
        if isinstance(written, bytes):
            path.write_bytes(written)
        else:
            np.savez(path, **written)
        with pytest.raises(DataError) as caught:
            load_from(tmp_path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_damaged_idx_files_are_named(tmp_path, arrays):
    write(tmp_path, idx_files(arrays, zipped=True))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    whole = gzip.decompress(content)
    for written in (
        content[:1000],
        content[:-1],
        whole[:-1],
        whole + b"0",
        whole[:3],
        whole[:7],
        b"\0\0\x0d\x01" + bytes(8),
    ):
        path.write_bytes(written)
        with pytest.raises(DataError) as caught:
            load_from(tmp_path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("missing", list(NAMES.values()))
def test_a_missing_idx_file_is_named(tmp_path, arrays, no_network, missing):
    write(tmp_path / "mnist", idx_files(arrays, zipped=True))
    (tmp_path / "mnist" / f"{missing}.gz").unlink()
    with pytest.raises(DataError, match=f"{tmp_path}/mnist/{missing}"):
        load_from(tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_published_data_never_falls_back(tmp_path, no_network, name):
    with pytest.raises(DataNotFound, match=f"DATASET: got '{name}'") as caught:
        data.load(Settings(DATASET=name))
    for part in ("(no network)", f"{name}.npz", f"{tmp_path}/project/data", "HL_DATA_DIR"):
        assert part in str(caught.value)
    assert ("dataset-fashion-mnist" in str(caught.value)) == (name == "fashion_mnist")


def test_auto_falls_back_with_a_warning(no_network):
    with pytest.warns(UserWarning, match=r"(?s)NOT MNIST.*no network"):
        assert data.load(Settings(DATASET="auto")).name == "digits"


def test_auto_does_not_hide_a_damaged_file(tmp_path, no_network):
    write(tmp_path / "project" / "data", {"mnist.npz": b"half"})
    with pytest.raises(DataError, match=r"data/mnist\.npz: "):
        data.load(Settings(DATASET="auto"))


# --- Downloads -------------------------------------------------------------------------------


@pytest.fixture
def only_download(no_data, monkeypatch):
    # No proxy between this machine and the test's own server.
    monkeypatch.setenv("NO_PROXY", "*")


def downloads_from(monkeypatch, url, files, dataset="mnist", below=""):
    sums = {name: hashlib.sha256(files[name]).hexdigest() for name in files}
    monkeypatch.setitem(data._DOWNLOADS, dataset, (f"{url}/", below, sums))


@contextlib.contextmanager
def serving(folder):
    # The address of a web server on this machine with the folder's files, and what it was asked.
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path.strip("/"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_download_goes_to_keras_cache(
    tmp_path, monkeypatch, arrays, only_download, capsys, terminal
):
    content = write_npz(tmp_path / "served" / "mnist.npz", arrays).read_bytes()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with serving(tmp_path / "served") as (url, asked):
        downloads_from(monkeypatch, url, {"mnist.npz": content})
        dataset = data.load(Settings(DATASET="mnist"))
        assert (dataset.source, dataset.verdict) == ("mnist.npz", "canonical")
        # The second time the cache serves.
        assert data.load(Settings(DATASET="mnist")).verdict == "canonical"
    assert asked == ["mnist.npz"]
    (cached,) = (tmp_path / "keras" / "datasets").iterdir()
    assert (cached.name, cached.read_bytes()) == ("mnist.npz", content)
    assert cached.stat().st_mode & 0o777 == 0o644
    output, errors = capsys.readouterr()
    assert output == ""
    assert ("100%" in errors) == terminal == bool(errors)


def test_a_download_that_was_cut_off_is_continued(tmp_path, monkeypatch, arrays, only_download):
    files = idx_files(arrays, zipped=True)
    first, *others = files
    cache = write(tmp_path / "keras" / "datasets" / "fashion-mnist", {first: files[first]})
    with serving(write(tmp_path / "served", files)) as (url, asked):
        downloads_from(monkeypatch, url, files, "fashion_mnist", below="fashion-mnist")
        assert data.load(Settings(DATASET="fashion_mnist")).verdict == "canonical"
    assert asked == others
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == files


@pytest.mark.parametrize("served", [{"mnist.npz": b"another file"}, {}])
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, only_download, served):
    with serving(write(tmp_path / "served", served)) as (url, _):
        downloads_from(monkeypatch, url, {"mnist.npz": b"the file"})
        with pytest.raises(DataNotFound, match=r"'mnist'.*(hash|404)") as caught:
            data.load(Settings(DATASET="mnist"))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "keras" / "datasets").iterdir()) == []


def test_a_silent_server_is_given_up(tmp_path, monkeypatch, only_download):
    assert data._TIMEOUT <= 30
    monkeypatch.setattr(data, "_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        downloads_from(monkeypatch, url, {"mnist.npz": b"the file"})
        started = time.monotonic()
        with pytest.raises(DataNotFound, match="DATASET: got 'mnist'"):
            data.load(Settings(DATASET="mnist"))
        assert time.monotonic() - started < 5
    assert list((tmp_path / "keras" / "datasets").iterdir()) == []


def test_the_real_downloads_have_hashes():
    files = [item for *_, files in data._DOWNLOADS.values() for item in files.items()]
    assert [name for name, _ in files] == ["mnist.npz", *(f"{n}.gz" for n in NAMES.values())]
    assert all(len(bytes.fromhex(sha256)) == 32 for _, sha256 in files)


# --- Own datasets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((4, 8, 8), np.uint8)}, r"x_train: got shape \(4, 8, 8\)"),
        ({"x_train": np.zeros((4, 28, 28), np.float64)}, "x_train: got float64"),
        ({"x_test": np.full((2, 28, 28), 1.5, np.float32)}, "x_test: got .* 1.5"),
        ({"x_test": np.full((2, 28, 28), np.nan, np.float32)}, "x_test: got .* nan"),
        ({"x_test": np.zeros((2, 32, 32), np.uint8)}, r"x_test: got shape \(2, 32, 32\)"),
        ({"x_train": np.zeros((0, 28, 28), np.uint8)}, r"x_train: got shape \(0, 28, 28\)"),
        ({"y_test": np.array([0, -1])}, r"y_test: got .*\[-1, 0\], takes 0 to 3"),
        ({"y_test": np.array([0.0, 1.0])}, "y_test: got float64"),
        ({"y_train": np.array([0, 1, 2])}, r"y_train: got int64 of shape \(3,\)"),
        ({"y_train": np.array([0, 0, 2, 3])}, r"y_train: got .*\[0, 2, 3\]"),
        ({"y_test": np.array([0, 4])}, r"y_test: got .*\[0, 4\], takes 0 to 3"),
    ],
)
def test_datasets_are_checked(change, words):
    good = {
        "name": "own",
        "x_train": np.zeros((4, 28, 28), np.uint8),
        "y_train": np.array([0, 1, 2, 3]),
        "x_test": np.zeros((2, 28, 28), np.uint8),
        "y_test": np.array([0, 3]),
    }
    Dataset(**good)
    with pytest.raises(DataError, match=words):
        Dataset(**{**good, **change})


def test_an_own_dataset_has_the_name_of_its_entry(monkeypatch, digits):
    other = dataclasses.replace(digits, name="my data")
    monkeypatch.setitem(data.DATASETS, "mine", lambda data_dir: other)
    with pytest.raises(ConfigError, match="got 'mine', whose data are named 'my data'"):
        data.load(small_settings(DATASET="mine"))
    monkeypatch.setitem(data.DATASETS, "my data", lambda data_dir: other)
    assert data.load(small_settings(DATASET="my data")) is other
