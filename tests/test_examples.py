"""The examples run as a user runs them, and their checks can fail."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import torchleaf
from matplotlib.image import imread

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield


@pytest.fixture
def digits():
    return importlib.import_module("digits")


@pytest.fixture
def docstrings():
    return importlib.import_module("docstrings")


@pytest.fixture
def finetune():
    return importlib.import_module("finetune_text_encoder")


def run(folder, script, *arguments):
    """What a script prints, run in a folder on one thread, as this suite's other processes are."""
    command = [sys.executable, EXAMPLES / f"{script}.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(output, row):
    """The numbers in a row of the table that a script prints."""
    [rest] = re.findall(rf"^{row} +(.*)$", output, re.MULTILINE)
    return [float(x) for x in re.findall(r"(?<!\S)[\d.]+(?:e-?\d+)?", rest)]


def assert_is_plot(path):
    image = imread(path)
    assert image.shape == (600, 1950, 4)
    assert image.std() > 0.05


@pytest.mark.long
def test_train_digits(tmp_path):
    output = run(tmp_path, "train_digits")
    assert min(numbers(output, "test accuracy")) > 97
    difference, steps = numbers(output, "largest loss difference")
    assert difference < 2e-4
    assert steps == 20 * (1437 // 64)
    assert_is_plot(tmp_path / "digits.png")


@pytest.mark.long
@pytest.mark.parametrize("script", ["linen_digits", "nnx_digits"])
def test_flax_digits(tmp_path, script):
    output = run(tmp_path, script, "--epochs", "2", "--output", "plot.png")
    accuracies = numbers(output, "test accuracy")
    assert min(accuracies) > 75
    losses = numbers(output, "final training loss")
    assert losses[0] != losses[1]  # other masks
    difference, steps = numbers(output, "largest loss difference")
    assert difference < 5e-4
    assert steps == 1437 // 64
    assert_is_plot(tmp_path / "plot.png")


@pytest.mark.long
def test_jax_in_torch(tmp_path):
    output = run(tmp_path, "jax_in_torch", "--epochs", "2")
    assert min(numbers(output, "test accuracy")) > 60
    difference, steps = numbers(output, "largest loss difference")
    assert difference < 2e-4
    assert steps == 2 * (1437 // 64)
    assert_is_plot(tmp_path / "jax_in_torch.png")


GALLERY = {  # what a script needs of the packages that are not in the extra `test`
    "bayes": ["numpyro", "zuko"],
    "devices": [],
    "diffusion": ["diffusers"],
    "export": ["flatbuffers"],
    "graphs": ["torch_geometric"],
    "lora": ["peft"],
    "molecules": ["e3nn"],
    "neural_ode": [],
    "pendulums": [],
    "poisson": [],
}


@pytest.mark.long
@pytest.mark.gallery
@pytest.mark.all_cases
@pytest.mark.parametrize("script", GALLERY)
def test_gallery(tmp_path, script):
    missing = [package for package in GALLERY[script] if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    output = run(tmp_path, script, "--quick")  # which fails where a claim does not hold
    claims = re.findall(r"^.{58} *([\d.e+-]+)  \(at most ([\d.e+-]+)\)$", output, re.MULTILINE)
    assert len(claims) >= 2
    assert all(float(value) <= float(limit) for value, limit in claims)
    assert imread(tmp_path / f"{script}.png").std() > 0.05


def test_a_claim_that_does_not_hold_is_an_error(capsys):
    gallery = importlib.import_module("gallery")
    gallery.check("error", 0.5, 1.0)
    assert "5.00e-01  (at most 1e+00)" in capsys.readouterr().out
    for value in (1.5, float("nan")):
        with pytest.raises(RuntimeError, match=r"error: .*, more than 1\.0"):
            gallery.check("error", value, 1.0)


@pytest.mark.long
def test_finetune_text_encoder(tmp_path):
    output = run(tmp_path, "finetune_text_encoder", "--quick")
    frozen, tuned = numbers(output, "frozen encoder, JAX head"), numbers(output, "fine-tuned")
    assert len(frozen) == len(tuned) == 6
    assert min(frozen[0], tuned[0]) > 30  # by chance 20
    difference, steps = numbers(output, "largest loss difference")
    assert difference < 1e-4
    assert steps == 4
    assert numbers(output, "largest output difference")[0] < 1e-5
    assert_is_plot(tmp_path / "finetune_text_encoder.png")

    tuned = torch.load(tmp_path / "finetuned_encoder.pt", weights_only=True)
    original = importlib.import_module("finetune_text_encoder").load_encoder()
    assert tuned.keys() == original.state_dict().keys()
    for name, parameter in original.named_parameters():
        changed = not torch.equal(tuned[name], parameter)
        assert changed == (not name.startswith(("embeddings", "pooler"))), name
    original.load_state_dict(tuned)


def test_the_two_networks_start_alike(digits):
    example = importlib.import_module("train_digits")
    model = example.Classifier(jax.random.key(0))
    images = digits.load_data(seed=0)[1].images
    expected = example.make_torch_twin(model)(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(jax.vmap(model)(images), expected, rtol=1e-5, atol=1e-6)


def test_each_epoch_shows_each_image_at_most_once(digits):
    train, _ = digits.load_data(seed=0)
    first, second = digits.make_epochs(train, epochs=2, batch_size=100, seed=0)
    for epoch in (first, second):
        assert [batch.images.shape for batch in epoch] == [(100, 1, 8, 8)] * 14
        left_out = len(train.labels) - 1400
        shown = np.bincount(np.concatenate([batch.labels for batch in epoch]), minlength=10)
        missing = np.bincount(train.labels) - shown
        assert missing.min() >= 0
        assert missing.sum() == left_out
    assert not np.array_equal(first[0].labels, second[0].labels)


@pytest.mark.parametrize("error", [2e-3, -2e-3, np.nan])
def test_disagreement_is_an_error(digits, finetune, error):
    losses = np.linspace(2.0, 0.1, 10)
    wrong = np.where(np.arange(10) == 7, losses + error, losses)
    ours, theirs = digits.History(losses, np.ones(1)), digits.History(wrong, np.ones(1))
    assert digits.compare(ours, ours).max() == 0
    with pytest.raises(RuntimeError, match="disagree at step 7"):
        digits.compare(ours, theirs)

    assert finetune.compare(losses, losses[:5]) == finetune.compare(losses, wrong[:5]) == 0
    with pytest.raises(RuntimeError, match="disagree at step 7"):
        finetune.compare(losses, wrong[:9])


def test_different_accuracies_are_an_error(digits):
    cnn = importlib.import_module("digits_cnn")
    ours = digits.History(np.zeros(1), np.array([0.5, 0.98, 0.97]))
    cnn.check_accuracies(ours, digits.History(np.zeros(1), np.array([0.96])))
    for other in (0.95, np.nan):
        with pytest.raises(RuntimeError, match=r"reaches 98\.00%"):
            cnn.check_accuracies(ours, digits.History(np.zeros(1), np.array([other])))


def test_changed_frozen_parameters_are_an_error(finetune):
    model = torchleaf.TorchModule(
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    )

    def classifier(**changes):
        new = SimpleNamespace(params=dict(model.params), frozen=dict(model.frozen))
        for kind, name in changes.items():
            getattr(new, kind)[name] = getattr(new, kind)[name] + 1
        return SimpleNamespace(encoder=new)

    finetune.check_frozen(classifier(), classifier(params="0.weight"))
    for wrong in ({}, {"frozen": "1.bias"}, {"params": "0.weight", "frozen": "1.bias"}):
        with pytest.raises(RuntimeError, match="These parameters changed"):
            finetune.check_frozen(classifier(), classifier(**wrong))


def test_docstrings_are_cleaned(docstrings):
    docstring = inspect.cleandoc("""add(x1, x2, /)

    Adds two :class:`ndarrays <ndarray>` elementwise. As a :class:`torch.Tensor`. Like `np.add`. See numpy.

    .. versionadded:: 1.20
        For scientists.

    Computes :math:`a + b` of *arrays*. Read more in the :ref:`User Guide <adding>`. Then stops.

    Parameters
    ----------
    x1 : array_like
    """)
    assert docstrings.prose(docstring) == "Adds two array elementwise. Computes formula of array. Then stops."
    google = "Adds two numbers.\n\nArgs:\n  x: a number"
    assert docstrings.prose(google) == docstrings.prose("Adds two numbers.\n\n>>> 1 + 1") == "Adds two numbers."


def test_near_duplicates_are_left_out(docstrings):
    texts = [
        "Return the sum of the elements over an axis.",
        "Return the sum of the elements over a list.",
        "Return the sum of the weights, which must be finite, in double precision.",
        "Draw samples from a distribution with heavy tails.",
    ]
    found = docstrings.Texts(texts, np.array([0, 1, 1, 2]))
    kept = docstrings.without_near_duplicates(found)
    assert kept.texts == texts[2:]
    np.testing.assert_array_equal(kept.labels, [1, 2])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # from imports of deprecated modules
def test_no_docstring_leaks_or_names_its_library(docstrings):
    train, test = docstrings.make_task(400, 100, seed=0)
    np.testing.assert_array_equal(np.bincount(train.labels), [400] * 5)
    np.testing.assert_array_equal(np.bincount(test.labels), [100] * 5)

    def phrases(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    known = [phrases(text) for text in train.texts]
    for text in test.texts:
        own = phrases(text)
        assert max(len(own & other) for other in known) <= len(own) / 2, text
    for text in (*train.texts, *test.texts):
        assert not re.search(r"numpy|scipy|jax|torch|sklearn|scikit|\btensors?\b|\bimport\b", text, re.IGNORECASE), text
