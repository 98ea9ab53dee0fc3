"""A text task made of what is installed: which of five libraries does a docstring come from?"""

import importlib
import inspect
import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from sklearn.feature_extraction.text import CountVectorizer
from tqdm import tqdm

MODULES = {
    "numpy": " .char .fft .lib .lib.recfunctions .lib.stride_tricks .linalg .ma .polynomial .random .rec .strings"
    " .testing",
    "scipy": ".cluster.hierarchy .cluster.vq .fft .integrate .interpolate .io .linalg .ndimage .optimize .signal"
    " .signal.windows .sparse .sparse.csgraph .sparse.linalg .spatial .spatial.distance .special .stats .stats.qmc",
    "jax": " .custom_batching .custom_derivatives .debug .dlpack .dtypes .errors .experimental.checkify"
    " .experimental.pallas .experimental.sparse .export .extend.core .flatten_util .image .interpreters.ad"
    " .interpreters.mlir .interpreters.partial_eval .lax .monitoring .nn .nn.initializers .numpy .numpy.fft"
    " .numpy.linalg .ops .profiler .random .scipy.linalg .scipy.optimize .scipy.signal .scipy.special .sharding"
    " .stages .tree .tree_util",
    "torch": " .autograd .distributions .fft .func .linalg .nn .nn.functional .nn.init .nn.utils .nn.utils.prune"
    " .nn.utils.rnn .optim .optim.lr_scheduler .signal.windows .sparse .special .utils.data",
    "sklearn": ".base .cluster .compose .covariance .datasets .decomposition .dummy .ensemble .feature_extraction"
    " .feature_selection .gaussian_process .gaussian_process.kernels .impute .inspection .isotonic"
    " .kernel_approximation .linear_model .manifold .metrics .metrics.pairwise .mixture .model_selection .multiclass"
    " .multioutput .naive_bayes .neighbors .neural_network .pipeline .preprocessing .random_projection"
    " .semi_supervised .svm .tree .utils .utils.multiclass .utils.validation",
}
"""Public modules of each library, without the library's name."""

GIVEAWAYS = re.compile(
    r"numpy|scipy|jax|torch|sklearn|scikit|stablehlo|autograd|\b(np|sp|jnp|lax|xla|flax|aten|cuda)(\b|_)"
    r"|\bimport\b|\buser guide\b",
    re.IGNORECASE,
)
"""A sentence with one of these is left out, whatever the library that it is about."""

HEADING = re.compile(
    r"\s*(parameters|(keyword )?arg(ument)?s|attributes|inputs?|outputs?|shape|returns?|yields|raises|warn(ing)?s?"
    r"|notes?|see also|references|examples?)\s*:*\s*$",
    re.IGNORECASE,
)


class Texts(NamedTuple):
    """Docstrings and the index of each one's library in `MODULES`."""

    texts: list[str]
    labels: Int[np.ndarray, " n"]


def is_method(member: Any) -> bool:
    """Whether a class's member is one, or a property."""
    return callable(member) or isinstance(member, property)


def docstrings(library: str) -> set[str]:
    """Of the public functions, classes and methods in a library's modules that are its own."""
    found = list[Any]()
    for suffix in MODULES[library].split(" "):
        module = importlib.import_module(library + suffix)
        for value in (getattr(module, name) for name in dir(module) if not name.startswith("_")):
            home = str(getattr(value, "__module__", None) or library)
            if callable(value) and home.partition(".")[0].startswith(library):
                members = vars(value) if isinstance(value, type) else {}
                found += [value, *(x for name, x in members.items() if not name.startswith("_") and is_method(x))]
    return {docstring for x in found if (docstring := inspect.getdoc(x))}


def prose(docstring: str) -> str:
    """The sentences before the first section, in one line, without markup and without what names a library.

    The style of the sections (NumPy's or Google's), directives, roles and the name of the array type would tell
    libraries apart before a word is read.
    """
    lines = docstring.splitlines()
    kept, directive = list[str](), False
    for i, line in enumerate(lines):
        underlined = i + 1 < len(lines) and re.fullmatch(r"\s*[-=~]{3,}\s*", lines[i + 1])
        if HEADING.match(line) or underlined or ">>>" in line:
            break
        directive = line.startswith("..") or (directive and (not line.strip() or line.startswith(" ")))
        signature = i == 0 and re.match(r"[\w.]+\(", line)
        if not directive and not signature:
            kept.append(line)
    text = re.sub(r":math:`[^`]*`", "formula", " ".join(kept))
    text = re.sub(r":\w+:`~?\.?([^`<]*)(<[^`]*>)?`", r"\1", text)
    text = re.sub(r"\b(nd)?arrays?\b|\btensors?\b", "array", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", re.sub(r"[`*\\$]", "", text)).strip()
    return " ".join(x for x in re.split(r"(?<=[.!?:]) ", text) if not GIVEAWAYS.search(x))


def without_near_duplicates(found: Texts) -> Texts:
    """Texts that share at most half of their four-word phrases with any other text, of their library or another.

    jax.numpy and torch repeat much of NumPy's text, and methods that of their base classes. Such texts would be in the
    test set and the training set both.
    """
    vectorizer = CountVectorizer(ngram_range=(4, 4), token_pattern=r"\w+", binary=True)
    phrases: Any = vectorizer.fit_transform(found.texts)
    shared = (phrases @ phrases.T).tolil()
    shared.setdiag(0)
    chosen = shared.tocsr().max(axis=1).toarray().ravel() <= 0.5 * phrases.sum(axis=1).A1
    return Texts([found.texts[i] for i in np.flatnonzero(chosen)], found.labels[chosen])


def make_task(train: int, test: int, seed: int) -> tuple[Texts, Texts]:
    """Docstrings to train on and others to test on, as many of each library."""
    texts, labels = list[str](), list[int]()
    for label, library in enumerate(tqdm(MODULES, desc="docstrings", unit="library")):
        cleaned = {prose(docstring) for docstring in docstrings(library)}
        fitting = sorted(text for text in cleaned if len(text.split()) >= 8)
        texts += fitting
        labels += [label] * len(fitting)
    found = without_near_duplicates(Texts(texts, np.array(labels, np.int32)))
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.flatnonzero(found.labels == label)) for label in range(len(MODULES))]
    if (fewest := min(map(len, orders))) < train + test:
        raise RuntimeError(f"A library has only {fewest} docstrings that differ, but {train + test} are needed.")

    def take(part: slice) -> Texts:
        chosen = np.concatenate([order[part] for order in orders])
        return Texts([found.texts[i] for i in chosen], found.labels[chosen])

    return take(slice(train)), take(slice(train, train + test))
