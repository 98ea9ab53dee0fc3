"""The examples run as a user runs them, and their checks can fail."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from matplotlib.image import imread

SCRIPT = Path(__file__).parents[1] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_digits(tmp_path):
    plot = tmp_path / "digits.png"
    result = subprocess.run([sys.executable, SCRIPT, "--output", plot], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    [accuracies] = re.findall(r"^test accuracy +([\d.]+)% +([\d.]+)%$", result.stdout, re.MULTILINE)
    assert min(map(float, accuracies)) > 97
    [(difference, steps)] = re.findall(
        r"^largest loss difference +(\S+)  over (\d+) steps$", result.stdout, re.MULTILINE
    )
    assert float(difference) < 2e-4
    assert int(steps) == 20 * (1437 // 64)
    image = imread(plot)
    assert image.shape == (600, 1950, 4)
    assert image.std() > 0.05


def test_the_two_networks_start_alike(example):
    model = example.Classifier(jax.random.key(0))
    images = example.load_data(seed=0)[1].images
    expected = example.make_torch_twin(model)(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(jax.vmap(model)(images), expected, rtol=1e-5, atol=1e-6)


def test_each_epoch_shows_each_image_at_most_once(example):
    train, _ = example.load_data(seed=0)
    first, second = example.make_epochs(train, epochs=2, batch_size=100, seed=0)
    for epoch in (first, second):
        assert [batch.images.shape for batch in epoch] == [(100, 1, 8, 8)] * 14
        left_out = len(train.labels) - 1400
        shown = np.bincount(np.concatenate([batch.labels for batch in epoch]), minlength=10)
        missing = np.bincount(train.labels) - shown
        assert missing.min() >= 0
        assert missing.sum() == left_out
    assert not np.array_equal(first[0].labels, second[0].labels)


@pytest.mark.parametrize("error", [2e-3, -2e-3, np.nan])
def test_disagreement_is_an_error(example, error):
    losses = np.linspace(2.0, 0.1, 10)
    ours = example.History(losses, np.ones(1))
    theirs = example.History(np.where(np.arange(10) == 7, losses + error, losses), np.ones(1))
    assert example.compare(ours, ours).max() == 0
    with pytest.raises(RuntimeError, match="disagree at step 7"):
        example.compare(ours, theirs)
