"""Datasets, and how their training images are spread over the nodes as shards.

To use other data, add a function ``(data_dir) -> Dataset`` to ``DATASETS``, under the dataset's
name. To use another partition, add a function ``(labels, settings, rng) -> list of index arrays``
to ``SHARD_RULES``.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError, Settings, UserError, absolute, stream


class DataError(UserError):
    """A dataset's file is damaged, truncated or holds something else."""


class DataNotFound(UserError):
    """A dataset is nowhere on this machine and can't be downloaded."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Dataset:
    """Images with labels, split into training and test.

    Attributes:
        name: appears in tables, folder names and figures.
        x_train, x_test: (n, height, width) or (n, height, width, channels), uint8 in [0, 255],
            or float32 in [0, 1].
        y_train, y_test: (n,) integers, the classes 0, 1, ... without gaps in training.
        source: where the data came from, in words without a path.
        verdict: ``canonical`` (the published arrays, by SHA-256), ``not canonical``,
            ``unverified`` (no reference to compare with) or ``stand-in`` (bundled digits).

    Raises:
        DataError: shapes, dtypes, ranges or labels that don't fit together.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    source: str = "own"
    verdict: str = "unverified"

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            fits = x.ndim in (3, 4) and len(x) > 0 and min(x.shape[1:3]) >= 16
            fits = fits and x.shape[1:] == self.x_train.shape[1:]
            takes = "(n, height, width[, channels]), from 16 x 16 pixels on, the same in both parts"
            self._require(fits, f"x_{part}: got shape {x.shape}", takes)
            fits = x.dtype == np.uint8 or (x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1)
            got = f"x_{part}: got {x.dtype} from {x.min()} to {x.max()}"
            self._require(fits, got, "uint8, or float32 in [0, 1]")
            fits = y.shape == x.shape[:1] and y.dtype.kind in "iu"
            got = f"y_{part}: got {y.dtype} of shape {y.shape}"
            self._require(fits, got, f"integers of shape ({len(x)},)")
        train, test = np.unique(self.y_train).tolist(), np.unique(self.y_test).tolist()
        fits = len(train) > 1 and train == list(range(len(train)))
        self._require(fits, f"y_train: got the labels {train}", "0, 1, ... without gaps")
        fits, takes = set(test) <= set(train), f"0 to {train[-1]}, as y_train"
        self._require(fits, f"y_test: got the labels {test}", takes)

    def _require(self, condition: bool, got: str, takes: str) -> None:
        if not condition:
            raise DataError(f"{self.name}: {got}, takes {takes}")

    @property
    def classes(self) -> int:
        """Number of classes: the greatest training label plus one."""
        return int(self.y_train.max()) + 1

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images as the foundation model sees them."""
        height, width, *channels = self.x_train.shape[1:]
        return height, width, *(channels or [1])

    @cached_property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of each array after an IDX header, hexadecimal, whatever file it came from."""
        sums = {}
        for key in _IDX_FILES:
            array = getattr(self, key)
            if array.dtype.kind in "iu" and array.max() < 256:
                array = array.astype(np.uint8)
            code = 0x08 if array.dtype == np.uint8 else 0x0D if array.dtype == np.float32 else 0x0C
            header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
            sums[key] = hashlib.sha256(header + array.tobytes()).hexdigest()
        return sums


# --- MNIST and Fashion-MNIST -----------------------------------------------------------------

_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

# Of the published arrays, as ``Dataset.sha256``.
_SHA256 = {
    "mnist": {
        "x_train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "y_train": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "x_test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "y_test": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion_mnist": {
        "x_train": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "y_train": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "x_test": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "y_test": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}

# What is downloaded: the address, the folder in Keras' cache and each file's SHA-256. The files of
# Fashion-MNIST are Zalando's own, which Keras mirrors; they hold the arrays above.
_ZALANDO_SHA256 = {
    "x_train": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "y_train": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "x_test": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "y_test": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_DOWNLOADS = {
    "mnist": (
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "",
        {"mnist.npz": "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"},
    ),
    "fashion_mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "fashion-mnist",
        {f"{_IDX_FILES[key]}.gz": sum_ for key, sum_ in _ZALANDO_SHA256.items()},
    ),
}

_TIMEOUT = 15.0  # seconds in which some bytes of a download have to come
_SYSTEM_FOLDER = Path("/usr/share/datasets")  # of Debian's package dataset-fashion-mnist


def load_published(name: str, data_dir: str) -> Dataset:
    """Return MNIST or Fashion-MNIST from DATA_DIR, the system or Keras' cache, or download it.

    Raises:
        ConfigError: DATA_DIR is not a folder.
        DataError: what was found is damaged, incomplete or another dataset.
        DataNotFound: nothing was found, and the download failed.
    """
    folder = absolute(data_dir)
    if data_dir != "data" and not folder.is_dir():
        raise ConfigError(f"DATA_DIR: got {data_dir!r}, takes a folder that exists")
    path = _search(folder, name) or _search(_SYSTEM_FOLDER, name)
    try:
        path = path or _download(name)
    except Exception as error:  # whatever the network does, the user needs the ways out
        cause = " ".join(str(error).split()) or type(error).__name__
        package = "install Debian's dataset-fashion-mnist, " if name == "fashion_mnist" else ""
        raise DataNotFound(
            f"DATASET: got {name!r}, which is not on this machine. "
            f"Put {name}.npz or the four IDX files into {folder}, or into a folder that DATA_DIR "
            f"or the environment variable HL_DATA_DIR names, {package}or run once with network; "
            f"the download failed ({cause})"
        ) from error
    arrays = _read(path)
    try:
        dataset = Dataset(name, **arrays, source=path.name, verdict="canonical")
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    different = {key for key, sum_ in _SHA256[name].items() if dataset.sha256[key] != sum_}
    if different & {"y_train", "y_test"}:  # another dataset, or its images in another order
        takes = f"those of {name} in their published order; set DATA_DIR to a folder that has them"
        raise DataError(f"{path}: got other labels, takes {takes}")
    if different:
        text = f"{path} has the labels of {name}, but not its published pixels"
        warnings.warn(text, stacklevel=2)
        dataset = dataclasses.replace(dataset, verdict="not canonical")
    return dataset


def _search(root: Path, name: str) -> Path | None:
    """Return an archive below ``root``, else a folder with an IDX file, or None."""
    names = (name, name.replace("_", "-"))
    folders = [root / folder for folder in (*names, ".")]
    found = [folder / f"{stem}.npz" for folder in folders for stem in names]
    found += [_idx_path(folder, stem) for folder in folders for stem in _IDX_FILES.values()]
    path = next(filter(Path.is_file, found), None)
    return path.parent if path and path.suffix != ".npz" else path


def _idx_path(folder: Path, stem: str) -> Path:
    """Return an IDX file under the first of the names in use that exists, else the plain name."""
    names = [name + end for name in (stem, stem.replace("-idx", ".idx")) for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), folder / stem)


def _read(path: Path) -> dict[str, Any]:
    """Return the arrays of an ``.npz`` file or of the IDX files in a folder; never unpickle."""
    folder, arrays = path, {}
    try:
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
                raise ValueError("not a complete .npz archive")
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in _IDX_FILES}
        for key, stem in _IDX_FILES.items():
            path = _idx_path(folder, stem)
            arrays[key] = _read_idx(path)
        return arrays
    except Exception as error:  # NumPy, zipfile and gzip raise many types
        raise DataError(f"{path}: can't be read: {' '.join(str(error).split())}") from error


def _read_idx(path: Path) -> np.ndarray:
    """Read 00 00, the type (08 is uint8), the rank, the sizes as big-endian uint32, the values."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of uint8 values")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def _download(name: str) -> Path:
    """Return a dataset's place in Keras' cache; download what is missing there, each file whole."""
    import pooch

    url, folder, files = _DOWNLOADS[name]
    cache = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "datasets" / folder
    pooch.get_logger().setLevel("WARNING")
    place = pooch.create(cache, url, registry=files)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)
    for file in files:
        missing = not (cache / file).exists()
        path = Path(place.fetch(file, downloader=downloader))
        if missing:
            path.chmod(0o644)  # pooch's files are readable by their owner alone
    return cache if folder else path


# --- The bundled digits ----------------------------------------------------------------------


def load_digits(data_dir: str = "") -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits in MNIST's format: a stand-in (ours).

    The 8 x 8 images are enlarged to 20 x 20 in the middle of 28 x 28 pixels, as MNIST's are. A
    fifth of each class is the test set. The other digits of a class are repeated to 6,000 training
    images, enough for 150 nodes, each with a small distortion of its own. ``data_dir`` is not used.
    """
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits as load_bundled

    bundled = load_bundled()
    small = bundled.images.astype(np.float32) / 16  # published range: 0 to 16
    enlarged = np.clip(zoom(small, (1, 2.5, 2.5), order=1, grid_mode=True, mode="nearest"), 0, 1)
    images = np.pad(enlarged, ((0, 0), (4, 4), (4, 4)))
    labels = bundled.target.astype(np.uint8)

    rng = np.random.default_rng(0)  # one fixed dataset, whatever SEED is
    train, test = [], []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(len(members) * 0.2)
        test.append(members[:cut])
        train.append(np.resize(members[cut:], 6000))
    # Mixed classes, as in MNIST: the main_class rule takes its images in the dataset's order.
    train_index, test_index = (rng.permutation(np.concatenate(part)) for part in (train, test))
    parts = (_distorted(images[train_index], rng), images[test_index])
    x_train, x_test = (np.rint(255 * part).astype(np.uint8) for part in parts)
    source = "scikit-learn's bundled digits, training digits distorted"
    return Dataset(
        "digits", x_train, labels[train_index], x_test, labels[test_index], source, "stand-in"
    )


def _distorted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return each (n, 28, 28) image under a small random affine map about its middle."""
    import tensorflow as tf
    from keras import ops

    n, middle = len(images), (images.shape[1] - 1) / 2
    angle = np.deg2rad(rng.uniform(-5, 5, n))
    scale, shear = rng.uniform(0.95, 1.05, n), rng.uniform(-0.05, 0.05, n)
    shift = rng.uniform(-0.5, 0.5, (2, n))
    # Output pixel (x, y) takes its value from input pixel (a x + b y + c, d x + a y + f).
    a, b, d = (part / scale for part in (np.cos(angle), shear - np.sin(angle), np.sin(angle)))
    c = middle - a * middle - b * middle + shift[0]
    f = middle - d * middle - a * middle + shift[1]
    maps = np.stack([a, b, c, d, a, f, np.zeros(n), np.zeros(n)], axis=1).astype(np.float32)
    with tf.device("CPU"):  # the same digits whatever DEVICE is
        moved = ops.image.affine_transform(
            images[..., None], maps, interpolation="bilinear", fill_mode="constant"
        )
    return np.clip(ops.convert_to_numpy(moved)[..., 0], 0, 1)


def load_auto(data_dir: str) -> Dataset:
    """Return MNIST as ``load_published``, else the bundled digits with a warning.

    Departure: without MNIST the public code stops.
    """
    try:
        return load_published("mnist", data_dir)
    except DataNotFound as error:
        digits = "NOT MNIST: this run uses scikit-learn's bundled digits"
        text = f"{digits}; its numbers can't be compared with the paper's. {error}"
        warnings.warn(text, stacklevel=2)
        return load_digits()


DATASETS: dict[str, Callable[[str], Dataset]] = {
    "auto": load_auto,
    "mnist": partial(load_published, "mnist"),
    "fashion_mnist": partial(load_published, "fashion_mnist"),
    "digits": load_digits,
}


def load(settings: Settings) -> Dataset:
    """Return the dataset that DATASET names; ConfigError if none has this name."""
    dataset = _named("DATASET", settings.DATASET, DATASETS)(settings.DATA_DIR)
    if dataset.name not in DATASETS:  # a later run takes it by its own name
        got = f"got {settings.DATASET!r}, whose data are named {dataset.name!r}"
        raise ConfigError(f"DATASET: {got}, takes data that are named as in DATASETS")
    return dataset


def _named(setting: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ConfigError(f"{setting}: got {name!r}, takes one of {', '.join(known)}")
    return known[name]


# --- Shards ----------------------------------------------------------------------------------

Shards = list[np.ndarray]  # each node's training images, as indices


def main_class_shards(labels: np.ndarray, settings: Settings, rng: np.random.Generator) -> Shards:
    """Return shards with a main class each, and some images of all others (public code).

    Of node n's SAMPLES_PER_NODE = S images, m = round(HETEROGENEITY * S) are of class n mod C. In
    the dataset's order and with g = n // C, they are the main class's images [g m, (g+1) m). From
    the other classes come the images [g (S-m), (g+1) (S-m)). So with N = C the latter are nearly
    the same everywhere.
    """
    classes, size = int(labels.max()) + 1, settings.SAMPLES_PER_NODE
    main = round(settings.HETEROGENEITY * size)
    rest = size - main
    shards = []
    for node in range(settings.NUM_NODES):
        group, digit = divmod(node, classes)
        own = np.flatnonzero(labels == digit)[group * main : (group + 1) * main]
        others = np.flatnonzero(labels != digit)[group * rest : (group + 1) * rest]
        if len(own) < main or len(others) < rest:
            raise ConfigError(
                f"SAMPLES_PER_NODE: got {size}, takes fewer, or NUM_NODES does: the dataset has "
                f"too few training images for node {node} and its main class {digit}"
            )
        shards.append(np.concatenate([own, others]))
    return shards


def iid_shards(labels: np.ndarray, settings: Settings, rng: np.random.Generator) -> Shards:
    """Return IID shards: drawn from all images, without overlap (the field's usual)."""
    _check_disjoint(labels, settings)
    order = rng.permutation(len(labels))[: settings.NUM_NODES * settings.SAMPLES_PER_NODE]
    return np.split(order, settings.NUM_NODES)


def dirichlet_shards(labels: np.ndarray, settings: Settings, rng: np.random.Generator) -> Shards:
    """Return disjoint shards of the same size with Dirichlet class shares, drawn for each node.

    DIRICHLET_ALPHA is each class's concentration (Hsu, Qi and Brown 2019, arXiv 1909.06335). Where
    a class runs out, its share goes to the classes that are left, in proportion.
    """
    _check_disjoint(labels, settings)
    classes = int(labels.max()) + 1
    pools = [rng.permutation(np.flatnonzero(labels == c)).tolist() for c in range(classes)]
    shards = []
    for _ in range(settings.NUM_NODES):
        shares = rng.dirichlet(np.full(classes, settings.DIRICHLET_ALPHA))
        shard: list[int] = []
        while missing := settings.SAMPLES_PER_NODE - len(shard):
            left = np.array([len(pool) for pool in pools])
            open_shares = np.where(left > 0, shares, 0)
            if open_shares.sum() == 0:  # every class that this node wants is gone
                open_shares = left.astype(float)
            wanted = rng.multinomial(missing, open_shares / open_shares.sum())
            for pool, count in zip(pools, np.minimum(wanted, left), strict=True):
                shard.extend(pool.pop() for _ in range(count))
        shards.append(np.array(shard))
    return shards


def _check_disjoint(labels: np.ndarray, settings: Settings) -> None:
    size, most = settings.SAMPLES_PER_NODE, len(labels) // settings.NUM_NODES
    if size > most:
        raise ConfigError(
            f"SAMPLES_PER_NODE: got {size}, takes at most {most}, the training images per node"
        )


SHARD_RULES: dict[str, Callable[[np.ndarray, Settings, np.random.Generator], Shards]] = {
    "main_class": main_class_shards,
    "iid": iid_shards,
    "dirichlet": dirichlet_shards,
}


def label_counts(dataset: Dataset, shards: Shards) -> np.ndarray:
    """Return (N, classes) int64: how many training images of each class each node holds."""
    return np.stack([np.bincount(dataset.y_train[s], minlength=dataset.classes) for s in shards])


def make_shards(dataset: Dataset, settings: Settings) -> Shards:
    """Return which training images each node has: N int32 arrays of indices into ``x_train``.

    ConfigError if there is no such rule, or the dataset can't fill it.
    """
    rule = _named("SHARD_RULE", settings.SHARD_RULE, SHARD_RULES)
    shards = [*map(np.asarray, rule(dataset.y_train, settings, stream(settings.SEED, "shards")))]
    size = len(dataset.y_train)
    if len(shards) != settings.NUM_NODES or not all(
        s.ndim == 1 and s.size > 0 and s.dtype.kind in "iu" and s.min() >= 0 and s.max() < size
        for s in shards
    ):
        raise ConfigError(
            f"SHARD_RULE: got {len(shards)} shards of {settings.SHARD_RULE!r}, takes NUM_NODES = "
            f"{settings.NUM_NODES} arrays of integers, none empty, all below {size}"
        )
    return [shard.astype(np.int32) for shard in shards]
