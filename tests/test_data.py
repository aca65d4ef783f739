import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import socket
import struct
import threading
import time

import numpy as np
import pytest
from conftest import small_settings

import config
import data
from config import ConfigError, make_settings
from data import DataError, DataNotFound, Dataset

# --- Shards ----------------------------------------------------------------------------------


def slow_main_class_shard(labels, node, main, rest):
    """The public code's rule for one node, image by image."""
    group, digit = node // 10, node % 10
    own = [i for i, label in enumerate(labels) if label == digit]
    others = [i for i, label in enumerate(labels) if label != digit]
    return own[group * main : (group + 1) * main] + others[group * rest : (group + 1) * rest]


def test_main_class_shards_by_hand():
    # Two classes, four nodes, 4 images a node of which H = 0.75 are of the main class.
    labels = np.array([0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
    settings = make_settings(NUM_NODES=4, SAMPLES_PER_NODE=4, HETEROGENEITY=0.75)
    shards = data.main_class_shards(labels, settings, None)
    assert [shard.tolist() for shard in shards] == [
        [0, 1, 3, 2],  # class 0: its images 0-2, and the first other image
        [2, 4, 5, 0],
        [6, 8, 9, 4],  # class 0 again: its images 3-5, and the second other image
        [7, 10, 11, 1],
    ]


@pytest.mark.parametrize("nodes", [10, 25])
@pytest.mark.parametrize("heterogeneity", [0.0, 0.2, 0.8, 1.0])
def test_main_class_shards_against_the_slow_rule(digits, nodes, heterogeneity):
    settings = small_settings(NUM_NODES=nodes, SAMPLES_PER_NODE=50, HETEROGENEITY=heterogeneity)
    shards = data.make_shards(digits, settings)
    main = {0.0: 0, 0.2: 10, 0.8: 40, 1.0: 50}[heterogeneity]
    for node, shard in enumerate(shards):
        expected = slow_main_class_shard(digits.y_train.tolist(), node, main, 50 - main)
        assert shard.tolist() == expected


def test_main_class_shards_reach_as_far_as_the_data(digits):
    # 6,000 images a class, 400 a node: 15 nodes of each class fit, 151 nodes do not.
    assert len(data.make_shards(digits, make_settings(NUM_NODES=150))) == 150
    with pytest.raises(ConfigError, match=r"node 150 needs 6400 training images of class 0"):
        data.make_shards(digits, make_settings(NUM_NODES=151))


def test_iid_shards_are_disjoint_and_even(digits):
    settings = make_settings(SHARD_RULE="iid", NUM_NODES=20, SAMPLES_PER_NODE=3000)
    shards = data.make_shards(digits, settings)
    assert sorted(np.concatenate(shards).tolist()) == list(range(60_000))
    # Hypergeometric: 300 of each class expected, standard deviation 16.
    for shard in shards:
        counts = np.bincount(digits.y_train[shard], minlength=10)
        assert abs(counts - 300).max() < 5 * 16
    with pytest.raises(ConfigError, match="takes at most 3000"):
        data.make_shards(digits, dataclasses.replace(settings, SAMPLES_PER_NODE=3001))


def test_dirichlet_shards(digits):
    def shares(alpha, seed=0):
        settings = make_settings(
            SHARD_RULE="dirichlet", DIRICHLET_ALPHA=alpha, SEED=seed, NUM_NODES=50
        )
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
    settings = make_settings(
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
    with pytest.raises(
        ConfigError, match=r"SHARD_RULE: got . shards of 'mine', takes NUM_NODES = 4"
    ):
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


def test_digits_test_images_are_untouched_and_not_in_training(digits):
    """Each test image is one original, enlarged by nothing but bilinear interpolation."""
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
    test = {image.tobytes() for image in digits.x_test}
    assert not any(image.tobytes() in test for image in digits.x_train)


class Fixed:
    """Stands for a generator: each draw is a constant, in the order of the calls."""

    def __init__(self, *values):
        self.values = iter(values)

    def uniform(self, low, high, size):
        return np.full(size, next(self.values), float)


def test_distortions_by_hand():
    """In the order angle, scale, shear, shift: by whole pixels and right angles."""
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
    assert len(np.unique(digits.x_train.reshape(60_000, -1), axis=0)) > 59_900


def test_digits_distortions_are_small_and_not_seeded_by_the_run(digits):
    again = data.load_digits(make_settings(SEED=5))
    assert again.sha256 == digits.sha256
    # Mass and middle stay about where they are: 0.5 pixels of shift, 5 degrees, 5 %.
    rows = np.arange(28)
    for part in (digits.x_train[:3000], digits.x_test):
        mass = part.sum(axis=(1, 2), dtype=float)
        middle = (part.sum(axis=2) @ rows) / mass
        assert abs(middle.mean() - 13.5) < 0.5
    ratio = digits.x_train.mean() / digits.x_test.mean()
    assert 0.95 < ratio < 1.05


# --- Files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist_like():
    """Arrays with MNIST's shapes and label counts; the pixels are not MNIST's."""
    published = data._PUBLISHED["mnist"]
    rng = np.random.default_rng(0)
    arrays = {}
    for part, counts in (("train", published.train_counts), ("test", published.test_counts)):
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), counts))
        arrays[f"x_{part}"] = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = labels
    return arrays


def write_idx(folder, arrays, zipped, dotted=False):
    folder.mkdir(exist_ok=True)
    for key, stem in data._IDX_FILES.items():
        array = arrays[key]
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        content += array.tobytes()
        name = stem.replace("-idx", ".idx") if dotted else stem
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (folder / name).write_bytes(content)
    return folder


def load_file(path, dataset="mnist"):
    return data.load(make_settings(DATASET=dataset, DATA_FILE=str(path)))


@pytest.mark.parametrize("form", ["npz", "idx", "idx.gz", ".idx"])
def test_forms_of_mnist(tmp_path, mnist_like, form, capsys):
    if form == "npz":
        path = tmp_path / "any.npz"
        np.savez(path, **mnist_like)
    else:
        path = write_idx(tmp_path / "idx", mnist_like, form == "idx.gz", form == ".idx")
    dataset = load_file(path)
    for key, array in mnist_like.items():
        assert (getattr(dataset, key) == array).all()
    # Right shapes and labels, other pixels: taken, with a warning.
    assert dataset.verdict == "not canonical"
    assert "not its published pixels" in capsys.readouterr().err


def test_sha256_is_that_of_the_idx_files(tmp_path, mnist_like):
    folder = write_idx(tmp_path / "idx", mnist_like, zipped=False)
    sums = load_file(folder).sha256
    for key, stem in data._IDX_FILES.items():
        assert sums[key] == hashlib.sha256((folder / stem).read_bytes()).hexdigest()


def test_one_idx_file_stands_for_its_folder(tmp_path, mnist_like):
    folder = write_idx(tmp_path / "idx", mnist_like, zipped=False)
    assert len(load_file(folder / "t10k-labels-idx1-ubyte").y_train) == 60_000


def test_canonical_mnist(mnist_path):
    dataset = load_file(mnist_path)
    assert dataset.verdict == "canonical"
    assert dataset.source == f"DATA_FILE: {mnist_path.name}"
    assert dataset.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert (dataset.classes, dataset.input_shape) == (10, (28, 28, 1))


def test_order_of_places(tmp_path, mnist_like, no_network, monkeypatch):
    def place(folder, value):
        folder.mkdir(parents=True)
        marked = dict(mnist_like, x_test=mnist_like["x_test"].copy())
        marked["x_test"][0, 0, 0] = value
        np.savez(folder / "mnist.npz", **marked)
        return folder / "mnist.npz"

    def found(**settings):
        return data.load(make_settings(DATASET="mnist", **settings)).x_test[0, 0, 0]

    place(tmp_path / "keras" / "datasets", 1)
    assert found() == 1
    place(tmp_path / "project" / "data", 2)
    assert found() == 2
    monkeypatch.setenv(data.DATA_VARIABLE, str(place(tmp_path / "variable", 3)))
    assert found() == 3
    named = place(tmp_path / "named", 4)
    assert found(DATA_FILE=str(named)) == 4


def test_fashion_mnist_in_its_place(tmp_path, no_network):
    folder = tmp_path / "keras" / "datasets"
    folder.mkdir(parents=True)
    write_idx(folder / "fashion-mnist", fashion_arrays(), zipped=True)
    dataset = data.load(make_settings(DATASET="fashion_mnist"))
    assert (dataset.name, dataset.verdict) == ("fashion_mnist", "unverified")
    with pytest.raises(DataError, match="not MNIST: y_train has"):
        load_file(folder / "fashion-mnist")


class Unpickled:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_damaged_and_foreign_files_are_named(tmp_path, mnist_like):
    whole = tmp_path / "whole.npz"
    np.savez(whole, **mnist_like)
    content = whole.read_bytes()

    def refuses(name, written, words):
        path = tmp_path / name
        if isinstance(written, bytes):
            path.write_bytes(written)
        else:
            np.savez(path, **written)
        with pytest.raises(DataError) as caught:
            load_file(path)
        assert str(path) in str(caught.value)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    refuses("truncated.npz", content[: len(content) // 2], "not a complete .npz")
    flipped = bytearray(content)
    flipped[1000] ^= 0xFF
    refuses("flipped.npz", bytes(flipped), "damaged")
    refuses("empty.npz", b"", "not a complete .npz")
    refuses("text.npz", b"<html>404</html>", "not a complete .npz")
    refuses("keys.npz", {"images": np.zeros(3)}, "has no array x_train")
    pickled = dict(mnist_like, y_test=np.array([Unpickled()] * 3, dtype=object))
    refuses("pickled.npz", pickled, "damaged")
    refuses("dtype.npz", dict(mnist_like, x_test=np.zeros((10_000, 28, 28))), "x_test is float64")
    refuses("shape.npz", dict(mnist_like, x_train=mnist_like["x_train"][:-1]), "(59999, 28, 28)")
    other = mnist_like["y_train"].copy()
    other[np.flatnonzero(other == 3)[0]] = 4
    refuses("labels.npz", dict(mnist_like, y_train=other), "not MNIST: y_train has")
    refuses(
        "black.npz", dict(mnist_like, x_test=np.zeros((10_000, 28, 28), np.uint8)), "all pixels"
    )


def test_damaged_idx_files_are_named(tmp_path, mnist_like):
    folder = write_idx(tmp_path / "idx", mnist_like, zipped=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()

    def refuses(written, words):
        path.write_bytes(written)
        with pytest.raises(DataError, match=words) as caught:
            load_file(folder)
        assert str(path) in str(caught.value)

    refuses(content[:1000], "damaged gzip file")
    refuses(gzip.decompress(content)[:-1], "7839999 values where the header says 7840000")
    refuses(b"\0\0\x0d\x01" + bytes(8), "not an IDX file of uint8")
    path.unlink()
    with pytest.raises(DataError, match="has no t10k-images-idx3-ubyte"):
        load_file(folder)


def test_mnist_never_falls_back(no_network):
    with pytest.raises(DataNotFound) as caught:
        data.load(make_settings(DATASET="mnist"))
    message = str(caught.value)
    assert "no network" in message
    for way in ("DATA_FILE", data.DATA_VARIABLE, "/data;", "Keras' cache"):
        assert way in message


def test_auto_falls_back_with_a_warning(no_network, capsys):
    dataset = data.load(make_settings(DATASET="auto"))
    assert dataset.name == "digits"
    warning = " ".join(capsys.readouterr().err.split())
    assert "NOT MNIST" in warning
    assert "no network" in warning


def test_auto_does_not_hide_a_damaged_file(tmp_path, no_network):
    folder = tmp_path / "project" / "data"
    folder.mkdir(parents=True)
    (folder / "mnist.npz").write_bytes(b"half")
    with pytest.raises(DataError, match=r"data/mnist\.npz: not a complete"):
        data.load(make_settings(DATASET="auto"))


@pytest.mark.parametrize("behaviour", ["silent", "trickling"])
def test_a_hanging_download_is_given_up(tmp_path, monkeypatch, behaviour):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(data, "_STALL_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(data, "_KERAS_URL", f"http://127.0.0.1:{port}/")
        if behaviour == "trickling":

            def trickle():
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n")
                    with contextlib.suppress(OSError):
                        while True:
                            connection.sendall(b"x")
                            time.sleep(0.1)

            threading.Thread(target=trickle, daemon=True).start()
        started = time.monotonic()
        # A socket's own time-out ends the silent one, only the watch over the file the other.
        words = "no progress" if behaviour == "trickling" else "no progress|timed out"
        with pytest.raises(Exception, match=words):
            data._download(data._PUBLISHED["mnist"])
        assert time.monotonic() - started < 5
    assert not (tmp_path / "datasets" / "mnist.npz").exists()


@contextlib.contextmanager
def serving(folder):
    """The address of a web server on this machine with the folder's files."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def fashion_arrays():
    arrays = {}
    for part, each in (("train", 6000), ("test", 1000)):
        arrays[f"y_{part}"] = np.repeat(np.arange(10, dtype=np.uint8), each)
        arrays[f"x_{part}"] = np.full((10 * each, 28, 28), 7, np.uint8)
    return arrays


def test_a_download_that_was_cut_off_is_continued(tmp_path, monkeypatch, capsys):
    """One of four files is there, and half of the second under its temporary name."""
    served = write_idx(tmp_path / "served", fashion_arrays(), zipped=True)
    cache = tmp_path / "keras" / "datasets" / "fashion-mnist"
    cache.mkdir(parents=True)
    first, second, *_ = sorted(path.name for path in served.iterdir())
    (cache / first).write_bytes((served / first).read_bytes())
    (cache / f"{second}.part").write_bytes((served / second).read_bytes()[:1000])
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(data, "PROJECT", tmp_path / "project")
    with serving(served) as url:
        monkeypatch.setattr(data, "_KERAS_URL", url)
        dataset = data.load(make_settings(DATASET="fashion_mnist"))
    assert dataset.source == "download by Keras"
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == {
        p.name: p.read_bytes() for p in served.iterdir()
    }
    # Not a terminal: nothing of Keras' progress.
    assert capsys.readouterr().out == ""


def test_a_download_goes_to_keras_cache_whole(tmp_path, monkeypatch, mnist_like):
    """Served from this machine; the hash that Keras states is replaced by the served file's."""
    served = tmp_path / "served"
    served.mkdir()
    np.savez(served / "mnist.npz", **mnist_like)
    digest = hashlib.sha256((served / "mnist.npz").read_bytes()).hexdigest()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    published = dataclasses.replace(data._PUBLISHED["mnist"], downloads={"mnist.npz": digest})
    monkeypatch.setitem(data._PUBLISHED, "mnist", published)
    monkeypatch.setattr(data, "PROJECT", tmp_path / "project")

    with serving(served) as url:
        monkeypatch.setattr(data, "_KERAS_URL", url)
        dataset = data.load(make_settings(DATASET="mnist"))
    assert dataset.source == "download by Keras"
    cached = tmp_path / "keras" / "datasets"
    assert [path.name for path in cached.iterdir()] == ["mnist.npz"]
    # The second time the server is gone, and the cache serves.
    assert data.load(make_settings(DATASET="mnist")).source == "Keras' cache: mnist.npz"


# --- Own datasets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((4, 8, 8), np.uint8)}, "at least 16 x 16"),
        ({"x_train": np.zeros((4, 28, 28), np.float64)}, "x_train is float64"),
        ({"x_test": np.full((2, 28, 28), 1.5, np.float32)}, r"must lie in \[0, 1\]"),
        ({"x_test": np.full((2, 28, 28), np.nan, np.float32)}, r"must lie in \[0, 1\]"),
        ({"x_test": np.zeros((2, 32, 32), np.uint8)}, "differ in shape"),
        ({"y_train": np.array([0, 1, 2])}, "y_train is int64 of shape"),
        ({"y_train": np.array([0, 0, 2, 3])}, "without gaps"),
        ({"y_test": np.array([0, 4])}, "must be 0 to 3"),
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


def test_digits_refuse_a_file():
    with pytest.raises(ConfigError, match="DATA_FILE"):
        data.load(make_settings(DATASET="digits", DATA_FILE="mnist.npz"))
