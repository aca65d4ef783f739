"""Datasets, and how their training images are spread over the nodes as shards.

To use other data, add a function ``(settings) -> Dataset`` to ``DATASETS``. To use another
partition, add a function ``(labels, settings, rng) -> list of index arrays`` to ``SHARD_RULES``.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import struct
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cli import warn
from config import ConfigError, Settings, UserError, absolute, stream


class DataError(UserError):
    """A dataset's file is damaged, truncated or holds something else."""


class DataNotFound(UserError):
    """A dataset is nowhere on this machine and can't be downloaded."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, split into training and test.

    Attributes:
        name: appears in tables, folder names and figures.
        x_train, x_test: (n, height, width) or (n, height, width, channels), uint8 in [0, 255],
            or float32 in [0, 1].
        y_train, y_test: (n,) integers, the classes 0, 1, ... without gaps in training.
        source: where the data came from, in words without a path.
        verdict: ``canonical`` (the arrays' SHA-256 are the published dataset's), ``not canonical``,
            ``unverified`` (no reference to compare with) or ``stand-in`` (bundled digits).
        sha256: of each array, hexadecimal; see ``idx_sha256``. Computed if empty.

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
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            shape = "(n, height, width) or (n, height, width, channels), at least 16 x 16 pixels"
            whole = x.ndim in (3, 4) and len(x) > 0 and min(x.shape[1:3]) >= 16
            self._require(whole, f"x_{part}", f"shape {x.shape}", shape)
            known = x.dtype in (np.uint8, np.float32)
            self._require(known, f"x_{part}", x.dtype, "uint8 or float32")
            span = f"values from {x.min()} to {x.max()}"
            fits = x.dtype == np.uint8 or (x.min() >= 0 and x.max() <= 1)
            self._require(fits, f"x_{part}", span, "float32 in [0, 1]")

            whole = y.shape == x.shape[:1] and y.dtype.kind in "iu"
            got = f"{y.dtype} of shape {y.shape}"
            self._require(whole, f"y_{part}", got, f"integers of shape ({len(x)},)")
            span = f"labels from {y.min()} to {y.max()}"
            fits = y.min() >= 0 and y.max() < self.classes
            self._require(fits, f"y_{part}", span, f"0 to {self.classes - 1}, as in y_train")
        image = self.x_train.shape[1:]
        got = f"images of shape {self.x_test.shape[1:]}"
        self._require(self.x_test.shape[1:] == image, "x_test", got, f"{image}, as in x_train")
        labels = np.unique(self.y_train).tolist()
        whole = len(labels) == self.classes > 1
        self._require(whole, "y_train", f"the labels {labels}", "0, 1, ... without gaps")
        if not self.sha256:
            object.__setattr__(self, "sha256", idx_sha256(self))

    def _require(self, condition: bool, key: str, got: Any, takes: str) -> None:
        if not condition:
            raise DataError(f"{self.name}: {key}: got {got}, takes {takes}")

    @property
    def classes(self) -> int:
        """Number of classes: the greatest training label plus one."""
        return int(self.y_train.max()) + 1

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images as the foundation model sees them."""
        height, width, *channels = self.x_train.shape[1:]
        return height, width, *(channels or [1])


def idx_sha256(dataset: Dataset) -> dict[str, str]:
    """Return the SHA-256 of each array as an IDX file (big-endian header, raw values).

    It does not depend on the container: the published IDX files, gzipped or not, and Keras'
    ``mnist.npz`` give the same four values.
    """
    sums = {}
    for key in _IDX_FILES:
        array = np.ascontiguousarray(getattr(dataset, key))
        if array.dtype != np.uint8 and array.dtype.kind in "iu" and array.max() < 256:
            array = array.astype(np.uint8)
        code = 0x08 if array.dtype == np.uint8 else 0x0D if array.dtype == np.float32 else 0x0C
        header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
        digest = hashlib.sha256(header)
        digest.update(array.data)
        sums[key] = digest.hexdigest()
    return sums


# --- MNIST and Fashion-MNIST -----------------------------------------------------------------

_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

# Of the published arrays, as idx_sha256.
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

# What is downloaded: the address, and the files in Keras' cache with the SHA-256 of each. Those of
# Fashion-MNIST are Zalando's own, which Keras mirrors; they hold the arrays above.
_KERAS_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets"
_ZALANDO_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
_ZALANDO_SHA256 = {
    "x_train": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "y_train": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "x_test": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "y_test": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_DOWNLOADS = {
    "mnist": (
        _KERAS_URL,
        {"mnist.npz": "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"},
    ),
    "fashion_mnist": (
        _ZALANDO_URL,
        {f"fashion-mnist/{_IDX_FILES[key]}.gz": sum_ for key, sum_ in _ZALANDO_SHA256.items()},
    ),
}

_TIMEOUT = 15.0  # seconds in which some bytes of a download have to come

# Debian's package dataset-fashion-mnist puts its files here.
_SYSTEM_FOLDER = Path("/usr/share/datasets")


def load_published(name: str, settings: Settings) -> Dataset:
    """Return MNIST or Fashion-MNIST from DATA_DIR, Keras' cache or the system, or download it.

    Args:
        name: ``mnist`` or ``fashion_mnist``.
        settings: only DATA_DIR is used.

    Raises:
        ConfigError: DATA_DIR is not a folder.
        DataError: what was found is damaged, incomplete or another dataset.
        DataNotFound: nothing was found, and the download failed.
    """
    path, source = _find(name, settings)
    arrays: dict[str, Any] = _read(path)
    try:
        dataset = Dataset(name, source=source, **arrays)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    different = {key for key in arrays if dataset.sha256[key] != _SHA256[name][key]}
    for key in ("y_train", "y_test"):
        if key in different:  # another dataset, or its images in another order
            counts = np.bincount(arrays[key]).tolist()
            raise DataError(
                f"{path}: {key}: got {counts} images of the classes 0, 1, ..., "
                f"takes the labels of {name} in their published order"
            )
    if different:
        warn(f"{path} has the labels of {name}, but not its published pixels")
    verdict = "not canonical" if different else "canonical"
    return dataclasses.replace(dataset, verdict=verdict)


def _find(name: str, settings: Settings) -> tuple[Path, str]:
    """Return an ``.npz`` file or a folder of IDX files, and in words where it was found."""
    folder = absolute(settings.DATA_DIR)
    if settings.DATA_DIR != "data" and not folder.is_dir():
        raise ConfigError(f"DATA_DIR: got {settings.DATA_DIR!r}, takes a folder that exists")
    # Elsewhere, some of the four IDX files may be a download that was cut off: it is continued.
    for place, root, least in (
        ("DATA_DIR", folder, 1),
        ("Keras' cache", _keras_cache(), 4),
        ("system", _SYSTEM_FOLDER, 4),
    ):
        path = _search(root, name, least)
        if path is not None:
            return path, f"{place}: {path.name}"
    try:
        return _download(name), "download"
    except Exception as error:  # whatever the network does, the user needs the ways out
        cause = " ".join(str(error).split()) or type(error).__name__
        debian = "install Debian's dataset-fashion-mnist, " if name == "fashion_mnist" else ""
        raise DataNotFound(
            f"DATASET: got {name!r}, which is not on this machine; its download failed ({cause}). "
            f"Put {name}.npz or the four IDX files into {folder}, or into a folder that DATA_DIR "
            f"or the environment variable HL_DATA_DIR names, {debian}or run once with network"
        ) from error


def _keras_cache() -> Path:
    return Path(os.path.expanduser(os.environ.get("KERAS_HOME") or "~/.keras")) / "datasets"


def _search(root: Path, name: str, least: int) -> Path | None:
    """Return an archive below ``root``, else a folder with at least some IDX files, or None."""
    names = (name, name.replace("_", "-"))
    folders = [root / folder for folder in (*names, ".")]
    archives = [folder / f"{stem}.npz" for folder in folders for stem in names]
    found = [path for path in archives if path.is_file()]
    for folder in folders:
        if sum(_idx_path(folder, stem).is_file() for stem in _IDX_FILES.values()) >= least:
            found.append(folder)
    return found[0] if found else None


def _idx_path(folder: Path, stem: str) -> Path:
    """Return an IDX file under the first of the names in use that exists, else the plain name."""
    names = [name + end for name in (stem, stem.replace("-idx", ".idx")) for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), folder / stem)


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` file or of the IDX files in a folder; never unpickle.

    Raises:
        DataError: a file is missing, damaged or of another format.
    """
    folder, arrays = path, {}
    try:
        if path.is_file():
            if not zipfile.is_zipfile(path):
                raise ValueError("not a complete .npz archive")
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in _IDX_FILES}
        for key, stem in _IDX_FILES.items():
            path = _idx_path(folder, stem)
            arrays[key] = _read_idx(path)
        return arrays
    except Exception as error:  # NumPy, zipfile, gzip and struct raise many types
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: can't be read: {cause}") from error


def _read_idx(path: Path) -> np.ndarray:
    """Read 00 00, the type (08 is uint8), the rank, the sizes as big-endian uint32, the values."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of uint8 values")
    rank = content[3]
    shape = struct.unpack_from(f">{rank}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _download(name: str) -> Path:
    """Download what Keras' cache lacks of a dataset; return its archive or folder there."""
    url, files = _DOWNLOADS[name]
    target = _keras_cache()
    for file, sha256 in files.items():
        target = _keras_cache() / file
        if not target.is_file():
            _download_file(f"{url}/{target.name}", sha256, target)
    return target if target.suffix == ".npz" else target.parent


def _download_file(url: str, sha256: str, target: Path) -> None:
    """Download a file, whole or not at all; give up when nothing comes for a while."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)
    pooch.retrieve(url, sha256, target.name, target.parent, downloader=downloader)
    os.chmod(target, 0o644)  # pooch makes files that their owner alone can read


# --- The bundled digits ----------------------------------------------------------------------

# Enough for 150 nodes of the main_class rule at 400 images of a main class each.
_DIGITS_PER_CLASS = 6000
_DIGITS_TEST_SHARE = 0.2
# The stand-in is one fixed dataset: its split and distortions do not follow SEED.
_DIGITS_SEED = 0


def load_digits(settings: Settings) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits in MNIST's format: a stand-in (ours).

    The 8 x 8 images are enlarged to 20 x 20 in the middle of 28 x 28 pixels, as MNIST's are. A
    fifth of each class is the test set, not distorted. The other digits of a class are repeated
    to 6,000 training images. Each gets a small seeded distortion: it is turned by up to 5
    degrees, scaled by 0.95 to 1.05, sheared by up to 0.05 and shifted by up to half a pixel.
    """
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits as load_bundled

    bundled = load_bundled()
    small = bundled.images.astype(np.float32) / 16  # published range: 0 to 16
    enlarged = np.clip(zoom(small, (1, 2.5, 2.5), order=1, grid_mode=True, mode="nearest"), 0, 1)
    images = np.pad(enlarged, ((0, 0), (4, 4), (4, 4)))
    labels = bundled.target.astype(np.uint8)

    rng = np.random.default_rng(_DIGITS_SEED)
    train, test = [], []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(len(members) * _DIGITS_TEST_SHARE)
        test.append(members[:cut])
        train.append(np.resize(members[cut:], _DIGITS_PER_CLASS))
    # Mixed classes, as in MNIST: the main_class rule takes its images in the dataset's order.
    train_index = rng.permutation(np.concatenate(train))
    test_index = rng.permutation(np.concatenate(test))
    return Dataset(
        name="digits",
        x_train=_to_uint8(_distorted(images[train_index], rng)),
        y_train=labels[train_index],
        x_test=_to_uint8(images[test_index]),
        y_test=labels[test_index],
        source="scikit-learn's bundled digits, training digits distorted",
        verdict="stand-in",
    )


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return np.rint(images * 255).astype(np.uint8)


def _distorted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return each (n, 28, 28) image under a small random affine map about its middle."""
    from keras import ops

    n, height, width = images.shape
    angle = np.deg2rad(rng.uniform(-5, 5, n))
    scale, shear = rng.uniform(0.95, 1.05, n), rng.uniform(-0.05, 0.05, n)
    shift = rng.uniform(-0.5, 0.5, (2, n))
    # Output pixel (x, y) takes its value from input pixel (a x + b y + c, d x + e y + f).
    a, b = np.cos(angle) / scale, (shear - np.sin(angle)) / scale
    d, e = np.sin(angle) / scale, np.cos(angle) / scale
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    c = middle_x - a * middle_x - b * middle_y + shift[0]
    f = middle_y - d * middle_x - e * middle_y + shift[1]
    maps = np.stack([a, b, c, d, e, f, np.zeros(n), np.zeros(n)], axis=1).astype(np.float32)
    moved = ops.image.affine_transform(
        images[..., None], maps, interpolation="bilinear", fill_mode="constant"
    )
    return np.clip(ops.convert_to_numpy(moved)[..., 0], 0, 1)


def load_auto(settings: Settings) -> Dataset:
    """Return MNIST if it can be found or downloaded, else the bundled digits with a warning.

    Raises:
        ConfigError, DataError: as ``load_published``.
    """
    try:
        return load_published("mnist", settings)
    except DataNotFound as error:
        bar = "=" * 88
        reasons = textwrap.fill(str(error), 88, break_long_words=False, break_on_hyphens=False)
        warn(
            f"NOT MNIST\n{bar}\nTHIS RUN USES SCIKIT-LEARN'S BUNDLED DIGITS INSTEAD OF MNIST.\n"
            "Its numbers can't be compared with the paper's. Results and plots say 'digits'.\n\n"
            f"{reasons}\n{bar}"
        )
        return load_digits(settings)


# The values of DATASET. A function added here can be named there.
DATASETS: dict[str, Callable[[Settings], Dataset]] = {
    "auto": load_auto,
    "mnist": partial(load_published, "mnist"),
    "fashion_mnist": partial(load_published, "fashion_mnist"),
    "digits": load_digits,
}


def load(settings: Settings) -> Dataset:
    """Return the dataset that DATASET names.

    Raises:
        ConfigError: no such dataset or shard rule, or DATA_DIR is not a folder.
        DataError, DataNotFound: as the dataset's own function.
    """
    _check_name("DATASET", settings.DATASET, DATASETS)
    _check_name("SHARD_RULE", settings.SHARD_RULE, SHARD_RULES)  # before a download
    return DATASETS[settings.DATASET](settings)


def _check_name(setting: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        raise ConfigError(f"{setting}: got {name!r}, takes one of {', '.join(known)}")


# --- Shards ----------------------------------------------------------------------------------


def main_class_shards(
    labels: np.ndarray, settings: Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return shards with a main class each, and some images of all others (public code).

    Of SAMPLES_PER_NODE = S images, m = round(HETEROGENEITY * S) are of the class n mod C and the
    rest of the other C - 1 classes. Both are taken in the dataset's order: with g = n // C, the
    main class's images [g m, (g+1) m) and the images [g (S-m), (g+1) (S-m)) of all the others.
    So with N = C the supplementary images are nearly the same on every node.

    Raises:
        ConfigError: the dataset has too few images of a class.
    """
    classes = int(labels.max()) + 1
    size = settings.SAMPLES_PER_NODE
    main = round(settings.HETEROGENEITY * size)
    shards = []
    for node in range(settings.NUM_NODES):
        group, digit = divmod(node, classes)
        own, others = np.flatnonzero(labels == digit), np.flatnonzero(labels != digit)
        taken = []
        for images, count, kind in ((own, main, "of"), (others, size - main, "outside")):
            end = (group + 1) * count
            if len(images) < end:
                raise ConfigError(
                    f"SAMPLES_PER_NODE: got {size}, takes fewer: node {node} needs {end} training "
                    f"images {kind} class {digit}, the dataset has {len(images)}"
                )
            taken.append(images[end - count : end])
        shards.append(np.concatenate(taken))
    return shards


def iid_shards(
    labels: np.ndarray, settings: Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return IID shards: drawn from all images, without overlap (the field's usual).

    Raises:
        ConfigError: the dataset has fewer than N * SAMPLES_PER_NODE training images.
    """
    _check_disjoint(labels, settings)
    order = rng.permutation(len(labels))[: settings.NUM_NODES * settings.SAMPLES_PER_NODE]
    return np.split(order, settings.NUM_NODES)


def dirichlet_shards(
    labels: np.ndarray, settings: Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return shards of the same size whose class shares are drawn for each, without overlap.

    The shares are Dirichlet with concentration DIRICHLET_ALPHA for each class (Hsu, Qi and
    Brown 2019, arXiv 1909.06335). Where a class runs out, its share goes to the classes that
    are left, in proportion.

    Raises:
        ConfigError: the dataset has fewer than N * SAMPLES_PER_NODE training images.
    """
    _check_disjoint(labels, settings)
    classes = int(labels.max()) + 1
    pools = [rng.permutation(np.flatnonzero(labels == c)).tolist() for c in range(classes)]
    shards = []
    for _ in range(settings.NUM_NODES):
        shares = rng.dirichlet(np.full(classes, settings.DIRICHLET_ALPHA))
        shard: list[int] = []
        while len(shard) < settings.SAMPLES_PER_NODE:
            left = np.array([len(pool) for pool in pools])
            open_shares = np.where(left > 0, shares, 0)
            if open_shares.sum() == 0:  # every class that this node wants is gone
                open_shares = left.astype(float)
            wanted = rng.multinomial(
                settings.SAMPLES_PER_NODE - len(shard), open_shares / open_shares.sum()
            )
            for pool, count in zip(pools, np.minimum(wanted, left), strict=True):
                shard.extend(pool.pop() for _ in range(count))
        shards.append(np.array(shard))
    return shards


def _check_disjoint(labels: np.ndarray, settings: Settings) -> None:
    size, most = settings.SAMPLES_PER_NODE, len(labels) // settings.NUM_NODES
    if size > most:
        raise ConfigError(
            f"SAMPLES_PER_NODE: got {size}, takes at most {most}: the dataset has {len(labels)} "
            f"training images for NUM_NODES = {settings.NUM_NODES}"
        )


# The values of SHARD_RULE. A function added here can be named there.
SHARD_RULES: dict[str, Callable[[np.ndarray, Settings, np.random.Generator], list[np.ndarray]]] = {
    "main_class": main_class_shards,
    "iid": iid_shards,
    "dirichlet": dirichlet_shards,
}


def make_shards(dataset: Dataset, settings: Settings) -> list[np.ndarray]:
    """Return which training images each node has: N int32 arrays of indices into ``x_train``.

    Raises:
        ConfigError: no such rule, or one that the dataset can't fill.
    """
    _check_name("SHARD_RULE", settings.SHARD_RULE, SHARD_RULES)
    rule = SHARD_RULES[settings.SHARD_RULE]
    shards = list(map(np.asarray, rule(dataset.y_train, settings, stream(settings.SEED, "shards"))))
    size = len(dataset.y_train)
    good = all(
        s.ndim == 1 and s.size > 0 and s.dtype.kind in "iu" and s.min() >= 0 and s.max() < size
        for s in shards
    )
    if len(shards) != settings.NUM_NODES or not good:
        raise ConfigError(
            f"SHARD_RULE: got {len(shards)} shards of {settings.SHARD_RULE!r}, takes NUM_NODES = "
            f"{settings.NUM_NODES} arrays of integers, none empty, all below {size}"
        )
    return [shard.astype(np.int32) for shard in shards]
