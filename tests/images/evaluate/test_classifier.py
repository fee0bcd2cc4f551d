"""The classifier whose features fit the data: training, features, files."""

import json

import pytest
import torch

from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.evaluate import ClassifierFeatures, train_classifier
from cldsde.images.evaluate.classifier import (
    ImageClassifier,
    load_classifier,
    random_features,
)
from cldsde.images.evaluate.distances import feature_name
from cldsde.images.tensor_files import save_tensors
from tiny_runs import noise_images


def bars(count: int, seed: int, size: int = 12) -> ArrayImages:
    """Noisy images with a bright bar: horizontal, vertical or none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randint(0, 120, (count, 1, size, size), generator=generator)
    places = torch.randint(0, size, (count,), generator=generator)
    for image, label, place in zip(images, labels, places, strict=True):
        if label == 0:
            image[0, place] += 100
        elif label == 1:
            image[0, :, place] += 100
    return ArrayImages(images.to(torch.uint8), labels=labels, classes=3)


@pytest.fixture(scope="module")
def trained():
    data = DataSet(bars(768, 0), bars(300, 1))
    return train_classifier(data, epochs=6, batch=64, width=8, size=16)


def test_classifier_learns_its_classes(trained):
    # Guessing gives 1/3; 300 images have a standard error of 0.017 at 0.9.
    assert trained[1] > 0.9


def test_training_depends_on_its_seed_alone_and_leaves_the_global_state():
    """Also with a short last batch."""
    images = bars(70, 0, size=8)
    data = DataSet(images, images.subset(torch.arange(3)))
    options = {"epochs": 1, "batch": 32, "width": 2, "size": 4}
    torch.rand(1)  # away from the state that a seeded training would leave
    before = torch.get_rng_state()
    (model, accuracy), (again, other) = (train_classifier(data, **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert accuracy == other
    assert accuracy in {0.0, 1 / 3, 2 / 3, 1.0}
    for key, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], x), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": DataSet(bars(4, 0, size=7), None)},
            r"\(B, 1, H, W\) with H and W at least 8; got",
        ),
        ({"data": DataSet(noise_images(), None)}, "data must have labels"),
        ({"batch": 1}, "batch: must be .* 2; got 1"),
    ],
)
def test_wrong_arguments_of_a_training_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(**{"data": DataSet(bars(4, 0), None), **changes})


def test_a_class_that_only_held_out_images_have_is_known():
    images = bars(9, 0)
    [some, rest] = (images.labels < 2).nonzero()[:, 0], (images.labels == 2).nonzero()[:, 0]
    data = DataSet(images.subset(some), images.subset(rest))
    assert train_classifier(data, epochs=1, width=2)[0].architecture["classes"] == 3


def test_features_take_bytes_and_are_named_by_their_weights(trained):
    images = bars(5, 2).load(torch.arange(5))
    features = ClassifierFeatures(trained[0])
    expected = trained[0].features(images.float() / 127.5 - 1)
    assert torch.equal(features(images), expected)
    assert feature_name(features).startswith("cldsde.images.evaluation:ImageClassifier:")
    assert feature_name(ClassifierFeatures(trained[0])) == feature_name(features)
    other = ClassifierFeatures(ImageClassifier(1, 3, width=8, size=16))
    assert feature_name(other) != feature_name(features)


def save(classifier: ImageClassifier, file, **notes: str) -> None:
    notes["architecture"] = json.dumps(classifier.architecture)
    save_tensors(file, "ImageClassifier", classifier.state_dict(), notes)


def test_saved_classifier_comes_back_bit_for_bit(trained, tmp_path):
    file = tmp_path / "classifier.safetensors"
    save(trained[0], file, data="bars")
    again, notes = load_classifier(file)
    assert notes == {"data": "bars"}
    images = bars(5, 2).load(torch.arange(5))
    assert not again.training
    assert torch.equal(ClassifierFeatures(again)(images), ClassifierFeatures(trained[0])(images))
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_weights_of_another_architecture_and_other_files_are_rejected(tmp_path):
    file, other = tmp_path / "classifier.safetensors", ImageClassifier(1, 3, width=4, size=6)
    other.architecture["width"] = 5
    save(other, file)
    with pytest.raises(ValueError, match=r"damaged: its weights do not fit its architecture"):
        load_classifier(file)
    save_tensors(file, "something else", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="must hold ImageClassifier; it holds something else"):
        load_classifier(file)


def test_features_of_random_weights_are_the_same_whenever_they_are_made():
    torch.manual_seed(1)
    first = random_features(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert random_features(5).name == first.name
    assert torch.equal(torch.get_rng_state(), state)
