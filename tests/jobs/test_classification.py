"""Testing a classifier: planted predictions have the figures they must have, and each option an effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.checkpoint import list_checkpoints
from jobs.evaluate import EvaluateConfig, draw_samples, run
from jobs.evaluation.classification import ClassifyConfig, _select, evaluate_runs, is_finetuned, mean_over_runs, measure
from jobs.evaluation.classification_report import write_report
from jobs.evaluation.confusion import draw_confusion
from jobs.evaluation.metrics import bootstrap_interval
from jobs.evaluation.predictions import PredictorSpec, predict_clips, split_parts
from jobs.finetune import PLAIN, MultiClipConfig, load_classifier, make_classifier, open_clips, predict
from pipeline.errors import ConfigError
from pipeline.labelled import LabelledClips
from pipeline.views import ViewChoice
from tests.jobs.labelled_tokens import CLASSES, finetune, make_config, make_labelled_tokens


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify") / "tokens"
    return make_labelled_tokens(folder, {"train": 4, "val": 2, "test": 8})


@pytest.fixture(scope="module")
def trained(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config(tokens, tmp_path_factory.mktemp("classify-run") / "run")
    finetune(replace(config, loop=replace(config.loop, steps=4, save_every_steps=2)))
    return config.out


def held_out(tokens: Path) -> tuple[LabelledClips, np.ndarray, np.ndarray]:
    """Clips, those of the test split, and their class numbers."""
    clips = open_clips(make_config(tokens, Path("unused")))
    chosen = clips.of_split("test")
    return clips, chosen, clips.class_numbers(chosen, CLASSES)


def plant(predicted: np.ndarray, confidence: float, num_classes: int = 3) -> np.ndarray:
    """Probabilities (n c) that have `confidence` in each prediction."""
    rest = (1 - confidence) / (num_classes - 1)
    return np.full((len(predicted), num_classes), rest) + (confidence - rest) * np.eye(num_classes)[predicted]


def test_a_perfect_model_and_one_that_knows_nothing(tokens: Path) -> None:
    clips, chosen, labels = held_out(tokens)
    perfect = measure(clips, chosen, labels, CLASSES, plant(labels, 0.9), ClassifyConfig()).figures
    assert perfect["top1"] == perfect["mean_class_accuracy"] == perfect["top1_low"] == perfect["top1_high"] == 1.0
    assert perfect["calibration_error"] == pytest.approx(0.1) and "top5" not in perfect
    assert (perfect["clips"], perfect["videos"], perfect["classes"]) == (24, 12, 3)
    uniform = measure(clips, chosen, labels, CLASSES, np.full((24, 3), 1 / 3), ClassifyConfig()).figures
    assert uniform["top1"] == pytest.approx(1 / 3) == uniform["chance"] == uniform["majority"]
    assert uniform["calibration_error"] == pytest.approx(0, abs=1e-9)
    assert uniform["top1_low"] < 1 / 3 < uniform["top1_high"]


def test_figures_of_a_model_that_never_says_sit(tokens: Path) -> None:
    clips, chosen, labels = held_out(tokens)
    keep = np.flatnonzero((labels != 2) | (np.arange(len(labels)) < 9))  # fewer of class 2
    labels, chosen = labels[keep], chosen[keep]
    predicted = np.where(labels == 2, 0, labels)
    config = ClassifyConfig(num_bins=4, resamples=300)
    report = measure(clips, chosen, labels, CLASSES, plant(predicted, 0.8), config)
    num_sit = int((labels == 2).sum())
    assert report.figures["top1"] == pytest.approx(1 - num_sit / len(labels))
    assert report.figures["mean_class_accuracy"] == pytest.approx(2 / 3)
    assert report.confusion.tolist() == [[8, 0, 0], [0, 8, 0], [num_sit, 0, 0]]
    videos = clips.video_ids[chosen].astype(str)
    expected = bootstrap_interval(predicted == labels, videos, num_resamples=300)
    assert (report.figures["top1_low"], report.figures["top1_high"]) == (expected.low, expected.high)
    assert len(report.calibration.counts) == 4
    rows = report.predictions.to_pylist()
    assert {row["predicted"] for row in rows if row["label"] == "sit"} == {"jump"}
    assert rows[0]["confidence"] == pytest.approx(0.8) and rows[0]["source"].endswith(".mp4")


def test_top_five_where_there_are_more_classes(tokens: Path) -> None:
    clips, chosen, labels = held_out(tokens)
    classes = (*CLASSES, "a", "b", "c")
    scores = plant((labels + 1) % 3, 0.5, 6)  # the label is second, with others
    figures = measure(clips, chosen, labels, classes, scores, ClassifyConfig()).figures
    assert figures["top1"] == 0 and figures["top5"] == 1.0 == figures["top5_high"]


def test_the_report_has_page_numbers_picture_and_predictions(tokens: Path, tmp_path: Path) -> None:
    clips, chosen, labels = held_out(tokens)
    report = measure(clips, chosen, labels, CLASSES, plant(np.zeros_like(labels), 0.7), ClassifyConfig())
    report.figures.update(
        split="test", checkpoint_step=8, selected_by="being the last", num_clips=2, crops=["center"], precision="fp32"
    )
    page, results, picture, predictions = write_report(tmp_path, report, title="a <run>")
    found = json.loads(results.read_text())
    assert found["top1"] == pytest.approx(1 / 3) and found["confusion"] == [[8, 0, 0]] * 3
    assert found["per_class"][1] == {
        "class": "run",
        "samples": 8,
        "accuracy": 0.0,
        "mistaken_for": "jump",
        "mistaken": 8,
    }
    assert [row["samples"] for row in found["calibration"]] == [24]
    text = page.read_text()
    for words in ("a &lt;run&gt;", "33.3%, 95 % interval", "jump (8)", "data:image/", "Calibration"):
        assert words in text
    assert Image.open(picture).size[0] > 100
    assert pq.read_table(predictions).num_rows == 24


def test_the_picture_of_a_confusion_matrix_is_darkest_where_most_samples_are() -> None:
    picture = draw_confusion(np.array([[9, 1], [0, 4]]), ("a", "b"))
    height, width = picture.shape[:2]
    cells = picture[height - 16 - 2 * 44 : height - 16, width - 16 - 2 * 44 : width - 16].reshape(2, 44, 2, 44, 3)
    corner = cells[:, 2, :, 2].astype(int).sum(axis=-1)
    assert corner[1, 1] < corner[0, 0] < corner[0, 1] < corner[1, 0]
    assert draw_confusion(np.eye(400, dtype=int), [f"class {n}" for n in range(400)]).shape[0] < 1000
    with pytest.raises(ValueError, match="3 classes"):
        draw_confusion(np.eye(2), CLASSES)


def test_predictions_are_the_mean_softmax_over_windows_and_views(tokens: Path, tmp_path: Path) -> None:
    config = make_config(tokens, tmp_path / "run")
    clips, chosen, _ = held_out(tokens)
    torch.manual_seed(0)
    classifier = make_classifier(config, CLASSES).eval()
    torch.nn.init.normal_(classifier.head.weight, std=3)
    views = ViewChoice(crops=("center", "start"), resized=False, flip=False)
    found = predict(classifier, clips, chosen[:2], views, 2, batch_size=3)
    _, rows, starts = clips.spread(chosen[:2], views, 2)
    with torch.inference_mode():
        each = classifier.logits(torch.from_numpy(clips.read(rows, starts).astype(np.int64))).softmax(-1).numpy()
    np.testing.assert_allclose(found, each.reshape(2, 4, 3).mean(axis=1), atol=1e-6)
    for other in (
        predict(classifier, clips, chosen[:2], PLAIN, 2, 3),
        predict(classifier, clips, chosen[:2], views, 1, 3),
    ):
        assert not np.allclose(found, other)
    np.testing.assert_allclose(found, predict(classifier, clips, chosen[:2], views, 2, 64), atol=1e-6)


def test_clips_are_predicted_in_parts_of_several_batches(tokens: Path, trained: Path) -> None:
    """Whoever computes them, so their batches are the same."""
    _, chosen, _ = held_out(tokens)
    spec = PredictorSpec(
        trained=make_config(tokens, trained),
        classes=CLASSES,
        checkpoint=list_checkpoints(trained)[-1],
        windows=MultiClipConfig(num_clips=3, views=PLAIN),
        batch_size=3,
        precision="fp32",
    )
    parts = split_parts(chosen, spec)
    assert [len(part) for part in parts] == [8, 8, 8] and np.array_equal(np.concatenate(parts), chosen)
    assert [len(part) for part in split_parts(chosen[:9], replace(spec, batch_size=1))] == [3, 3, 3]
    found = predict_clips(spec, chosen, 1)
    classifier = load_classifier(spec.trained, CLASSES, spec.checkpoint)
    np.testing.assert_allclose(found, predict(classifier, held_out(tokens)[0], chosen, PLAIN, 3, 64), atol=1e-6)
    rounded = predict_clips(replace(spec, precision="bf16"), chosen, 1)
    assert 0 < np.abs(rounded - found).max() < 0.02


def test_a_run_is_tested_in_its_own_precision_unless_told(
    tokens: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
    assert evaluate_runs([trained], None, 8, ClassifyConfig()).figures["precision"] == "fp32"
    assert evaluate_runs([trained], None, 8, ClassifyConfig(precision="bf16")).figures["precision"] == "bf16"


def test_the_checkpoint_is_chosen_by_the_validation_split_or_is_the_last(trained: Path) -> None:
    assert is_finetuned(trained) and not is_finetuned(trained / "checkpoints")
    cursors = [trained / "checkpoints" / name / "state.json" for name in ("00000002", "00000004")]
    before = [cursor.read_text() for cursor in cursors]
    for accuracies, step in (((1.0, 0.5), "00000002"), ((0.5, 0.5), "00000004"), ((0.0, 0.5), "00000004")):
        for cursor, text, accuracy in zip(cursors, before, accuracies, strict=True):
            cursor.write_text(json.dumps(json.loads(text) | {"val_accuracy": accuracy}))
        assert _select(list_checkpoints(trained), ClassifyConfig())[0].name == step
        assert _select(list_checkpoints(trained), ClassifyConfig(select="last"))[0].name == "00000004"
    for cursor, text in zip(cursors, before, strict=True):
        cursor.write_text(text)


def test_the_mean_over_runs_has_its_deviation() -> None:
    one = {"top1": 0.5, "mean_class_accuracy": 0.4, "calibration_error": 0.1, "clips": 9}
    assert mean_over_runs([one, one | {"top1": 0.7}]) == pytest.approx(
        {
            "top1": 0.6,
            "top1_std": np.std([0.5, 0.7], ddof=1),
            "mean_class_accuracy": 0.4,
            "mean_class_accuracy_std": 0,
            "calibration_error": 0.1,
            "calibration_error_std": 0,
        }
    )


def test_what_cannot_be_tested_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished fine-tuned run"):
        evaluate_runs([trained, tmp_path], None, 8, ClassifyConfig())
    other = make_labelled_tokens(tmp_path / "tokens", {"train": 2})
    with pytest.raises(ConfigError, match=r"classify.split = test: \S+ has no clip in it"):
        run(EvaluateConfig(run=trained, tokens=str(other)))
    other = make_labelled_tokens(tmp_path / "others", {"test": 2}, tokenizer="u" * 32)
    with pytest.raises(ConfigError, match="trained on other codes"):
        run(EvaluateConfig(run=trained, tokens=str(other)))
    with pytest.raises(ConfigError, match="for fine-tuned runs"):
        run(EvaluateConfig(run=tmp_path, more_runs=(trained,)))
    for wrong in ({"num_clips": 0}, {"num_bins": 0}, {"resamples": 0}, {"num_models": -1}):
        with pytest.raises(ConfigError, match=r"must be [01] or more"):
            ClassifyConfig(**wrong)  # type: ignore[arg-type]


def test_samples_to_predict_are_of_the_whole_dataset() -> None:
    few = draw_samples(20_000, 256)
    assert len(set(few)) == 256 and few.max() > 15_000 and few.min() < 5_000
    assert np.array_equal(np.bincount(draw_samples(10, 256)), np.full(10, 8))
