"""Datasets, and how their training images are spread over the nodes as shards.

Own data: add a function ``(settings) -> Dataset`` to ``DATASETS``; an own partition: add a
function ``(labels, settings, rng) -> list of index arrays`` to ``SHARD_RULES``.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import socket
import struct
import sys
import textwrap
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import PROJECT, ConfigError, Settings, UserError, absolute, reason, stream

# The environment's counterpart of DATA_FILE.
DATA_VARIABLE = "HL_DATA_FILE"


class DataError(UserError):
    """A dataset's file is damaged, truncated or not what it should be."""


class DataNotFound(UserError):
    """A dataset is nowhere on this machine and can't be downloaded."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, split into training and test.

    Attributes:
        name: appears in the results' columns, their folder and on plots.
        x_train, x_test: (n, height, width) or (n, height, width, channels), uint8 in [0, 255],
            or float32 in [0, 1].
        y_train, y_test: (n,) integers, the classes 0, 1, ... without gaps in training.
        source: where the data came from, in words without a path.
        verdict: ``canonical`` (the arrays' SHA-256 are the published dataset's), ``not canonical``,
            ``unverified`` (no reference to compare with) or ``stand-in`` (bundled digits).
        sha256: of each array, hexadecimal; see ``idx_sha256``. Filled in if empty.

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
            if x.ndim not in (3, 4) or len(x) == 0 or min(x.shape[1:3]) < 16:
                raise DataError(
                    f"{self.name}: x_{part} has shape {x.shape}, takes (n, height, width) or "
                    "(n, height, width, channels) with n >= 1 and at least 16 x 16 pixels"
                )
            if x.dtype not in (np.uint8, np.float32):
                raise DataError(f"{self.name}: x_{part} is {x.dtype}, takes uint8 or float32")
            if x.dtype == np.float32 and not (x.min() >= 0 and x.max() <= 1):
                raise DataError(f"{self.name}: float32 x_{part} must lie in [0, 1]")
            if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
                raise DataError(
                    f"{self.name}: y_{part} is {y.dtype} of shape {y.shape}, takes integers of "
                    f"shape ({len(x)},)"
                )
            if y.min() < 0 or y.max() >= self.classes:
                raise DataError(f"{self.name}: labels of y_{part} must be 0 to {self.classes - 1}")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                f"{self.name}: training images {self.x_train.shape[1:]} and test images "
                f"{self.x_test.shape[1:]} differ in shape"
            )
        if self.classes < 2 or len(np.unique(self.y_train)) != self.classes:
            raise DataError(f"{self.name}: the training labels must hold 0, 1, ... without gaps")
        if not self.sha256:
            object.__setattr__(self, "sha256", idx_sha256(self))

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
    """SHA-256 of the arrays as the IDX files that hold them (big-endian header, raw values).

    This is independent of the container: the canonical IDX files, gzipped or not, and Keras'
    ``mnist.npz`` all give the same four values.
    """
    sums = {}
    for key in ("x_train", "y_train", "x_test", "y_test"):
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


@dataclass(frozen=True)
class _Published:
    """What is known of a dataset in MNIST's format."""

    title: str
    train_counts: tuple[int, ...]  # images of class 0, 1, ... in training
    test_counts: tuple[int, ...]
    folders: tuple[str, ...]  # of IDX files, below data/ and ~/.keras/datasets/
    archives: tuple[str, ...]  # .npz files, there
    downloads: dict[str, str | None]  # file below _KERAS_URL: its SHA-256 where Keras states it
    sha256: dict[str, str] = field(default_factory=dict)  # as idx_sha256


_PUBLISHED = {
    "mnist": _Published(
        title="MNIST",
        train_counts=(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
        test_counts=(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
        folders=("mnist", "."),
        archives=("mnist.npz",),
        downloads={"mnist.npz": "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"},
        sha256={
            "x_train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "y_train": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "x_test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "y_test": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    # No SHA-256 of Fashion-MNIST's uncompressed files was at hand: its verdict is "unverified".
    "fashion_mnist": _Published(
        title="Fashion-MNIST",
        train_counts=(6000,) * 10,
        test_counts=(1000,) * 10,
        folders=("fashion-mnist", "fashion_mnist"),
        archives=("fashion_mnist.npz", "fashion-mnist.npz"),
        downloads={
            "fashion-mnist/train-images-idx3-ubyte.gz": None,
            "fashion-mnist/train-labels-idx1-ubyte.gz": None,
            "fashion-mnist/t10k-images-idx3-ubyte.gz": None,
            "fashion-mnist/t10k-labels-idx1-ubyte.gz": None,
        },
    ),
}

_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

# Where keras.datasets downloads from. Fashion-MNIST's files lie at its top.
_KERAS_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"

# A download that brings less than this in a window is given up.
_STALL_SECONDS = 15.0
_STALL_BYTES = 50_000

_Arrays = dict[str, np.ndarray]


def load_mnist(settings: Settings) -> Dataset:
    """MNIST, from the first of: DATA_FILE or HL_DATA_FILE, ``data/``, Keras' cache, a download.

    Raises:
        DataError: the file that was found is damaged, truncated or not MNIST.
        DataNotFound: there is no file, and the download failed.
    """
    return _load_published("mnist", settings)


def load_fashion_mnist(settings: Settings) -> Dataset:
    """Fashion-MNIST, searched and checked like MNIST (``load_mnist``)."""
    return _load_published("fashion_mnist", settings)


def _load_published(name: str, settings: Settings) -> Dataset:
    published = _PUBLISHED[name]
    arrays, path, source = _find(name, settings)
    for part, counts in (("train", published.train_counts), ("test", published.test_counts)):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        n = sum(counts)
        for key, array, shape in ((f"x_{part}", x, (n, 28, 28)), (f"y_{part}", y, (n,))):
            if array.dtype != np.uint8 or array.shape != shape:
                raise DataError(
                    f"{path}: {key} is {array.dtype} of shape {array.shape}; "
                    f"{published.title} has uint8 of shape {shape}"
                )
        if x.max() == 0:
            raise DataError(f"{path}: all pixels of x_{part} are 0")
        found = np.bincount(y, minlength=len(counts))
        if tuple(found.tolist()) != counts:
            raise DataError(
                f"{path}: not {published.title}: y_{part} has {found.tolist()} images of classes "
                f"0, 1, ...; {published.title} has {list(counts)}"
            )
    dataset = Dataset(name=name, source=source, **arrays)
    if not published.sha256:
        verdict = "unverified"
    else:
        verdict = "canonical" if dataset.sha256 == published.sha256 else "not canonical"
    if verdict == "not canonical":
        warn(f"{path} has {published.title}'s shapes and labels, but not its published pixels")
    object.__setattr__(dataset, "verdict", verdict)
    return dataset


def _find(name: str, settings: Settings) -> tuple[_Arrays, Path, str]:
    """The arrays, the path they came from, and that place in words."""
    published = _PUBLISHED[name]
    variable = os.environ.get(DATA_VARIABLE, "")
    named = absolute(settings.DATA_FILE) if settings.DATA_FILE else None
    given = Path(os.path.expanduser(variable)) if variable else None
    for place, path in (("DATA_FILE", named), (DATA_VARIABLE, given)):
        if path is not None:
            if not path.exists():
                raise DataError(f"{place}: {path} does not exist")
            return _read(path), path, f"{place}: {path.name}"
    for folder, words, some in (
        (PROJECT / "data", "the project's data folder", any),
        # Here a part of the files is a download that was cut off: it is continued below.
        (_keras_cache(), "Keras' cache", all),
    ):
        for path in _candidates(folder, published, some):
            return _read(path), path, f"{words}: {path.name}"
    try:
        path = _download(published)
    except Exception as error:  # whatever the network does, the user needs the three ways out
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataNotFound(
            f"DATASET: {name} is not on this machine and its download failed ({reason}). Provide "
            f"{published.archives[0]} or the four IDX files in one of three ways: name the path in "
            f"DATA_FILE or in the environment variable {DATA_VARIABLE}; put it into "
            f"{PROJECT / 'data'}; "
            "or run once with network, which fills Keras' cache"
        ) from error
    return _read(path), path, "download by Keras"


def _keras_cache() -> Path:
    return Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "datasets"


def _candidates(
    folder: Path, published: _Published, some: Callable[[Iterable[bool]], bool]
) -> list[Path]:
    """Archives below ``folder`` that exist, and folders with ``any`` or ``all`` IDX files."""
    archives = [folder / name for name in published.archives if (folder / name).is_file()]
    folders = [
        folder / name
        for name in published.folders
        if some(_idx_path(folder / name, stem) is not None for stem in _IDX_FILES.values())
    ]
    return archives + folders


def _idx_path(folder: Path, stem: str) -> Path | None:
    """An IDX file under one of the names that are in use, gzipped or not."""
    for name in (stem, stem.replace("-idx", ".idx")):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _read(path: Path) -> _Arrays:
    """The four arrays of an ``.npz`` file, or of the IDX files in a folder. Never unpickles."""
    if path.is_dir():
        archive = next((p for p in [path / "mnist.npz"] if p.is_file()), None)
        return _read_npz(archive) if archive else _read_idx_folder(path)
    if any(path.name.startswith((s, s.replace("-idx", ".idx"))) for s in _IDX_FILES.values()):
        return _read_idx_folder(path.parent)
    return _read_npz(path)


def _read_npz(path: Path) -> _Arrays:
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: not a complete .npz archive (truncated, or another format)")
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _IDX_FILES if key not in archive.files]
            if missing:
                raise DataError(f"{path}: has no array {missing[0]}; it holds {archive.files}")
            return {key: archive[key] for key in _IDX_FILES}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({reason(error)})") from error


def _read_idx_folder(folder: Path) -> _Arrays:
    arrays = {}
    for key, stem in _IDX_FILES.items():
        path = _idx_path(folder, stem)
        if path is None:
            raise DataError(f"{folder}: has no {stem} or {stem}.gz")
        arrays[key] = _read_idx(path)
    return arrays


def _read_idx(path: Path) -> np.ndarray:
    """One IDX file: 00 00, type (08 is uint8), rank, the sizes as big-endian uint32, values."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({reason(error)})") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path}: not an IDX file of uint8 values")
    rank = content[3]
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    expected = int(np.prod(shape, dtype=np.int64))
    if values.size != expected:
        raise DataError(f"{path}: {values.size} values where the header says {expected}")
    return values.reshape(shape)


def _download(published: _Published) -> Path:
    """Brings a dataset into Keras' cache and returns its path there; raises what goes wrong."""
    from keras.utils import get_file  # slow to import, and needed here alone

    path = _keras_cache()
    for name, sha256 in published.downloads.items():
        subfolder, _, basename = name.rpartition("/")
        target = _keras_cache() / subfolder / basename
        # Loaded under another name and renamed: a killed download leaves no half file behind.
        part = f"{basename}.part"

        def fetch(
            basename: str = basename,
            part: str = part,
            folder: Path = target.parent,
            sha256: str | None = sha256,
        ) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            # Keras would take what an earlier download left for the whole file.
            (folder / part).unlink(missing_ok=True)
            url = _KERAS_URL + basename
            # Its progress is for people: nothing of it where the output is not a terminal.
            shown = sys.stdout if sys.stdout.isatty() else io.StringIO()
            with contextlib.redirect_stdout(shown):
                loaded = get_file(part, url, file_hash=sha256, cache_subdir=str(folder))
            os.replace(loaded, folder / basename)

        if not target.is_file():
            _call_unless_stalled(fetch, target.parent / part)
        path = target
    return path


def _call_unless_stalled(fetch: Callable[[], None], growing: Path) -> None:
    """Runs ``fetch`` in a thread, for as long as the file that it writes keeps growing.

    A socket's own time-out does not cover name resolution, nor a server that sends a byte now
    and then; watching the file does.

    Raises:
        TimeoutError: less than 50 kB came in 15 s.
        Exception: whatever ``fetch`` raised.
    """
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            fetch()
        except Exception as error:
            failures.append(error)

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        size, since = 0, time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            now = 0
            with contextlib.suppress(OSError):
                now = growing.stat().st_size
            if now >= size + _STALL_BYTES:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > _STALL_SECONDS:
                raise TimeoutError(f"no progress for {_STALL_SECONDS:.0f} s")
    finally:
        socket.setdefaulttimeout(previous)
    if failures:
        raise failures[0]


# --- The bundled digits ----------------------------------------------------------------------

# Enough for 150 nodes of the main_class rule at 400 images of a main class each.
_DIGITS_PER_CLASS = 6000
_DIGITS_TEST_SHARE = 0.2
# The stand-in is one fixed dataset: its split and distortions do not follow SEED.
_DIGITS_SEED = 0


def load_digits(settings: Settings) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, brought to MNIST's format: a stand-in (ours).

    The 8 x 8 images are enlarged to 20 x 20 in the middle of 28 x 28 pixels, as MNIST's are. A
    fifth of each class is the test set, untouched. Each class's other digits are repeated to
    6,000 training images, each with a small seeded distortion: turned by up to 5 degrees,
    scaled by 0.95 to 1.05, sheared by up to 0.05, shifted by up to half a pixel.

    Raises:
        ConfigError: DATA_FILE names a file, which this dataset would not use.
    """
    if settings.DATA_FILE and settings.DATASET == "digits":
        raise ConfigError(
            f"DATA_FILE: got {settings.DATA_FILE!r}, takes '' with DATASET = 'digits', "
            "which scikit-learn brings along"
        )
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
    """Each (n, 28, 28) image under a small random affine map about its middle."""
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
    """MNIST where it can be had, else the bundled digits with a warning.

    Raises:
        DataError: there is a file of MNIST, but it is damaged.
    """
    try:
        return load_mnist(settings)
    except DataNotFound as error:
        bar = "=" * 88
        reasons = textwrap.fill(str(error), 88, break_long_words=False, break_on_hyphens=False)
        warn(
            f"NOT MNIST\n{bar}\nTHIS RUN USES SCIKIT-LEARN'S BUNDLED DIGITS INSTEAD OF MNIST.\n"
            "Its numbers can't be compared with the paper's. Results and plots say 'digits'.\n\n"
            f"{reasons}\n{bar}"
        )
        return load_digits(settings)


def warn(message: str) -> None:
    """A warning to the user, on stderr."""
    sys.stderr.write(f"warning: {message}\n")
    sys.stderr.flush()


# The values of DATASET. A function added here can be named there.
DATASETS: dict[str, Callable[[Settings], Dataset]] = {
    "auto": load_auto,
    "mnist": load_mnist,
    "fashion_mnist": load_fashion_mnist,
    "digits": load_digits,
}
BUILT_IN = frozenset(DATASETS)  # those that depend on DATASET and DATA_FILE alone


def load(settings: Settings) -> Dataset:
    """The dataset that DATASET names.

    Raises:
        ConfigError: no such dataset, or a setting that it can't use.
        DataError, DataNotFound: as the dataset's own function.
    """
    if settings.DATASET not in DATASETS:
        raise ConfigError(f"DATASET: got {settings.DATASET!r}, takes one of {', '.join(DATASETS)}")
    _check_shard_rule(settings)  # before a download, or a long warning
    return DATASETS[settings.DATASET](settings)


# --- Shards ----------------------------------------------------------------------------------


def main_class_shards(
    labels: np.ndarray, settings: Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    """The public code's rule: node n has a main class, and some images of all the others.

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
    rest = size - main
    shards = []
    for node in range(settings.NUM_NODES):
        group, digit = divmod(node, classes)
        own, others = np.flatnonzero(labels == digit), np.flatnonzero(labels != digit)
        if len(own) < (group + 1) * main:
            raise ConfigError(
                f"SAMPLES_PER_NODE: got {size} for NUM_NODES = {settings.NUM_NODES}, takes a size "
                f"whose {main} main images fit: node {node} needs {(group + 1) * main} training "
                f"images of class {digit}, the dataset has {len(own)}"
            )
        if len(others) < (group + 1) * rest:
            raise ConfigError(
                f"SAMPLES_PER_NODE: got {size} for NUM_NODES = {settings.NUM_NODES}, takes a size "
                f"whose {rest} supplementary images fit: node {node} needs {(group + 1) * rest} "
                f"training images outside class {digit}, the dataset has {len(others)}"
            )
        shards.append(
            np.concatenate(
                [
                    own[group * main : (group + 1) * main],
                    others[group * rest : (group + 1) * rest],
                ]
            )
        )
    return shards


def iid_shards(
    labels: np.ndarray, settings: Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    """IID: every node draws its images from all of them, without overlap (the field's usual).

    Raises:
        ConfigError: the dataset has fewer than N * SAMPLES_PER_NODE training images.
    """
    _check_disjoint(labels, settings)
    order = rng.permutation(len(labels))[: settings.NUM_NODES * settings.SAMPLES_PER_NODE]
    return np.split(order, settings.NUM_NODES)


def dirichlet_shards(
    labels: np.ndarray, settings: Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    """Dirichlet(alpha): every node draws its own class shares, then its images, without overlap.

    The shares are Dirichlet with concentration DIRICHLET_ALPHA for each class (Hsu, Qi and
    Brown 2019, arXiv 1909.06335); all shards have the same size. Where a class runs out, its
    share goes to the classes that are left, in proportion.

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
    needed = settings.NUM_NODES * settings.SAMPLES_PER_NODE
    if needed > len(labels):
        raise ConfigError(
            f"SAMPLES_PER_NODE: got {settings.SAMPLES_PER_NODE}, takes at most "
            f"{len(labels) // settings.NUM_NODES}: {settings.NUM_NODES} nodes need {needed} "
            f"training images, the dataset has {len(labels)}"
        )


# The values of SHARD_RULE. A function added here can be named there.
SHARD_RULES: dict[str, Callable[[np.ndarray, Settings, np.random.Generator], list[np.ndarray]]] = {
    "main_class": main_class_shards,
    "iid": iid_shards,
    "dirichlet": dirichlet_shards,
}


def _check_shard_rule(settings: Settings) -> None:
    if settings.SHARD_RULE not in SHARD_RULES:
        raise ConfigError(
            f"SHARD_RULE: got {settings.SHARD_RULE!r}, takes one of {', '.join(SHARD_RULES)}"
        )


def make_shards(dataset: Dataset, settings: Settings) -> list[np.ndarray]:
    """Which training images each node has: N arrays of indices into ``dataset.x_train``.

    Raises:
        ConfigError: no such rule, or one that the dataset can't fill.
    """
    _check_shard_rule(settings)
    rule = SHARD_RULES[settings.SHARD_RULE]
    shards = list(map(np.asarray, rule(dataset.y_train, settings, stream(settings.SEED, "shards"))))
    size = len(dataset.y_train)
    good = all(
        shard.ndim == 1
        and shard.dtype.kind in "iu"
        and shard.size > 0
        and shard.min() >= 0
        and shard.max() < size
        for shard in shards
    )
    if len(shards) != settings.NUM_NODES or not good:
        raise ConfigError(
            f"SHARD_RULE: got {len(shards)} shards of {settings.SHARD_RULE!r}, takes NUM_NODES = "
            f"{settings.NUM_NODES} arrays of integers, none empty, all below {size}"
        )
    return [shard.astype(np.int32) for shard in shards]
