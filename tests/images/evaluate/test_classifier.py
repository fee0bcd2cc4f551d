"""The classifier whose features fit the data: training, features, files."""

import json

import pytest
import torch

from cldsde.images.data import DataSet, digits
from cldsde.images.evaluate import ClassifierFeatures, train_classifier
from cldsde.images.evaluate.classifier import ImageClassifier, kept_classifier, random_features
from cldsde.images.evaluate.distances import feature_name
from cldsde.images.tensor_files import save_tensors
from tiny_runs import noise_images
from trainings import assert_same_bits

DIGITS = digits()
FIVE = DIGITS.held_out.load(torch.arange(5))


@pytest.fixture(scope="module")
def trained():
    return train_classifier(DIGITS, batch=64, width=8, size=16)


def test_classifier_learns_its_classes(trained):
    # Guessing gives 1/10; 359 images have a standard error of 0.016 at 0.9.
    assert trained[1] > 0.9


def test_training_depends_on_its_seed_alone_and_leaves_the_global_state():
    """Also with a short last batch."""
    data = DataSet(*(DIGITS.train.subset(torch.arange(n)) for n in (70, 3)))
    options = {"epochs": 1, "batch": 32, "width": 2, "size": 4}
    torch.rand(1)  # away from the state that a seeded training would leave
    before = torch.get_rng_state()
    (model, accuracy), (again, other) = (train_classifier(data, **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert accuracy == other
    assert accuracy in {0.0, 1 / 3, 2 / 3, 1.0}
    assert_same_bits(model, again)


def test_images_that_cannot_be_classified_are_rejected():
    with pytest.raises(ValueError, match="data must have labels"):
        train_classifier(DataSet(noise_images(), None))


def test_a_class_that_only_held_out_images_have_is_known():
    last = DIGITS.train.labels[:40] == 9
    some, rest = (DIGITS.train.subset(x.nonzero()[:, 0]) for x in (~last, last))
    assert train_classifier(DataSet(some, rest), epochs=1, width=2)[0].architecture["classes"] == 10


def test_features_take_bytes_and_are_named_by_their_weights(trained):
    features = ClassifierFeatures(trained[0])
    assert torch.equal(features(FIVE), trained[0].features(FIVE.float() / 127.5 - 1))
    assert feature_name(features).startswith("cldsde.images.evaluation:ImageClassifier:")
    assert feature_name(ClassifierFeatures(trained[0])) == feature_name(features)
    other = ClassifierFeatures(ImageClassifier(1, 10, width=8, size=16))
    assert feature_name(other) != feature_name(features)


def test_weights_of_another_architecture_are_rejected(tmp_path):
    file, other = tmp_path / "classifier.safetensors", ImageClassifier(1, 3, width=4, size=6)
    notes = {"architecture": json.dumps({**other.architecture, "width": 5})}
    save_tensors(file, "ImageClassifier", other.state_dict(), notes)
    with pytest.raises(ValueError, match=r"has no classifier .*; delete it"):
        kept_classifier(file, DIGITS)


def test_features_of_random_weights_are_the_same_whenever_they_are_made():
    torch.manual_seed(1)
    first = random_features(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert random_features(5).name == first.name
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 17)])
def test_images_of_any_size_have_features(shape):
    classifier = ImageClassifier(shape[0], 2).eval()
    assert classifier.features(torch.rand(2, *shape)).shape == (2, 128)
