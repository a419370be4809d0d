"""The quality study: its measures on pictures whose faults are known, and a small run of it all."""

import json
import sys

import metrics
import numpy as np
import pytest
import quality
import sampling
from cells import Cell, bilinear, grown
from metrics import Features, estimate
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from scipy.stats import multivariate_normal
from training.landscapes import sample


@pytest.fixture(scope="module")
def drawings():
    return np.stack([sample(seed)[0] for seed in range(160)])


def noisy(pictures):
    noise = np.random.default_rng(0).normal(0, 12, pictures.shape)
    return (pictures + noise).clip(0, 255).astype(np.uint8)


def blurred(pictures):
    return np.stack([gaussian_filter(picture, (2, 2, 0)) for picture in pictures])


FAULTS = {
    "blur": blurred,
    "noise": noisy,
    "colours": lambda pictures: np.roll(pictures, 1, -1),
    "halves swapped": lambda pictures: np.roll(pictures, 128, 1),
}


def once(n):
    return np.ones((1, n), int)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_put_the_distances_up(drawings, fault):
    reference, others = drawings[:80], drawings[80:]
    describe = Features.fit(reference)
    distances = [
        metrics.frechet_of(describe(pictures), once(80), describe(reference))[0]
        for pictures in (reference, others, FAULTS[fault](others))
    ]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[2] > 2 * distances[1]
    if fault in ("blur", "noise"):
        power = [metrics.band_powers(p).mean(0) for p in (reference, others, FAULTS[fault](others))]
        apart = [metrics.spectrum_distance(p, power[0]) for p in power]
        assert apart[0] == 0
        assert apart[2] > 3 * apart[1]


def test_features_have_mean_0_and_variance_1_on_their_reference(drawings):
    features = Features.fit(drawings[:80])(drawings[:80])
    assert features.shape == (80, 31)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(0), 1, rtol=1e-5)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # Along common axes the roots multiply: Σ (s - t)² of the deviations.
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    s, t = np.array([1.0, 2.0, 0.5]), np.array([0.3, 2.5, 1.0])
    covariances = [turn @ np.diag(d**2) @ turn.T for d in (s, t)]
    means = np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.5])
    found = metrics.frechet(means[0], covariances[0], means[1], covariances[1])
    assert found == pytest.approx(1 + 1 + 0.25 + ((s - t) ** 2).sum(), rel=1e-12)
    # Any two, by SciPy's root of their product.
    from scipy.linalg import sqrtm

    a, b = (m @ m.T for m in np.random.default_rng(1).standard_normal((2, 4, 6)))
    expected = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert metrics.frechet(np.zeros(4), a, np.zeros(4), b) == pytest.approx(expected, rel=1e-9)


def test_bands_hold_the_power_of_the_dct(drawings):
    picture = drawings[0]
    grey = picture.astype(np.float64) @ metrics.LUMINANCE / 255
    power, omega = dctn(grey, norm="ortho") ** 2, np.hypot(np.arange(256)[:, None], np.arange(256)) / 2
    edges = np.geomspace(1, 128, metrics.BANDS + 1)
    ours = metrics.band_powers(picture[None])[0]
    for low, high, found in [(edges[0], edges[1], ours[0]), (edges[-2], edges[-1], ours[-1])]:
        assert found == pytest.approx(power[(omega >= low) & (omega < high)].mean(), rel=1e-4)
    # Half the amplitude is 6.02 dB less everywhere.
    assert metrics.spectrum_distance(ours / 4, ours) == pytest.approx(6.0206, abs=1e-4)


def test_pictures_are_like_themselves_and_less_like_others(drawings):
    some = drawings[:4]
    with np.errstate(divide="ignore"):
        assert np.isinf(metrics.psnr(some, some)).all()
    np.testing.assert_allclose(metrics.ssim(some, some), 1)
    slightly = (some.astype(int) + np.where(some < 128, 5, -5)).astype(np.uint8)
    np.testing.assert_allclose(metrics.psnr(slightly, some), 10 * np.log10(255**2 / 25), rtol=1e-6)
    assert (metrics.ssim(drawings[4:8], some) < metrics.ssim(slightly, some)).all()


def test_attributes_are_those_of_the_scene(drawings):
    scenes = [sample(seed)[2] for seed in range(40)]
    # Drawn sharply: the check is made for decoded pictures.
    assert metrics.attributes_found(drawings[:40], scenes).mean() > 0.7
    assert metrics.attributes_found(drawings[:40], scenes[1:] + scenes[:1]).mean() < 0.4


def test_the_bootstraps_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(metrics.means(values, metrics.resamples(400, 4000)))
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert found.certain
    again = estimate(metrics.means(values, metrics.resamples(400, 4000)))
    assert again == found


def test_paired_differences_are_surer_than_their_parts():
    draw = np.random.default_rng(0)
    shared = draw.normal(0, 1, 300)
    counts = metrics.resamples(300, 2000)
    ours, base = (metrics.means(shared + draw.normal(shift, 0.1, 300), counts) for shift in (0.05, 0))
    difference = quality.differences({"m": ours}, {"m": base, "other": base})["m"]
    assert difference["certain"]
    assert difference["high"] - difference["low"] < (estimate(ours).high - estimate(ours).low) / 3


def test_what_few_pictures_add_to_a_frechet_distance_is_taken_off():
    draw = np.random.default_rng(0)
    reference = draw.normal(0, 1, (4000, 12))
    found, corrected = [], []
    for _ in range(8):
        features = draw.normal(0, 1, (100, 12))
        draws = metrics.frechet_of(features, metrics.resamples(100, 200), reference)
        found.append(draws[0])
        corrected.append(estimate(draws, corrected=True).value)
    # Of the same law, so the distance is 0.
    assert np.mean(found) > 0.3
    assert abs(np.mean(corrected)) < 0.25 * np.mean(found)


def test_weighted_frechet_is_that_of_the_pictures_drawn():
    draw = np.random.default_rng(0)
    features, reference = draw.normal(0, 1, (50, 4)), draw.normal(0.3, 1.2, (70, 4))
    counts = metrics.resamples(50, 3)
    repeated = np.repeat(features, counts[2], 0)
    direct = metrics.frechet(
        repeated.mean(0), np.cov(repeated.T, bias=True), reference.mean(0), np.cov(reference.T, bias=True)
    )
    assert metrics.frechet_of(features, counts, reference)[2] == pytest.approx(direct, rel=1e-9)
    assert multivariate_normal.logpdf(reference.mean(0), np.zeros(4)) > -10  # the sets do overlap


def test_bilinear_growth_is_interpolation():
    latents = np.arange(4.0).reshape(1, 1, 1, 4)
    grown_latents = bilinear(latents, np.zeros((1, 1, 1, 8)), 0.5, 1.0, "dct")
    np.testing.assert_allclose(grown_latents[0, 0, 0, 1:7], np.arange(6) / 2 + 0.25)


def test_a_small_study_from_end_to_end(tmp_path, monkeypatch):
    cells = [
        Cell("fullres", steps=4),
        Cell("dct_rewind 0.2", grown("dct_rewind", 0.2), steps=4),
        Cell("fewer steps, as 0.2", as_fast_as="dct_rewind 0.2"),
    ]
    monkeypatch.setattr(quality, "CELLS", cells)
    monkeypatch.setattr(quality, "QUESTIONS", [("dct_rewind 0.2", "fewer steps, as 0.2"), ("a", "b")])
    for name, value in {"RESAMPLES": 20, "REFERENCE_COUNT": 40}.items():
        monkeypatch.setattr(quality, name, value)
    flags = ["--count", "3", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["quality.py", *flags])
    quality.main()
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    figures = report["cells"]
    assert list(figures) == [cell.name for cell in cells]
    assert figures["dct_rewind 0.2"]["steps"] == [3, 1]
    assert figures["dct_rewind 0.2"]["faster"] > figures["fewer steps, as 0.2"]["faster"] > 1
    assert set(figures["fullres"]) == {"attributes", "frechet", "spectrum", "flops", "faster", "steps"}
    assert set(figures["dct_rewind 0.2"]["psnr"]) == {"value", "low", "high"}
    assert set(figures["dct_rewind 0.2"]["frechet"]["difference"]) == {"value", "low", "high", "certain"}
    assert report["questions"][0]["first"] == "dct_rewind 0.2"
    assert (tmp_path / "out" / "quality.md").read_text().count("\n") == 2 + len(cells) + 1 + 3 + 1
    for name in ("quality.png", "sheet.jpg"):
        with Image.open(tmp_path / "out" / name) as image:
            image.load()


def test_a_second_run_makes_only_what_changed(tmp_path):
    class FakeDemo:
        count, made = 2, ()

        def plan(self, cell, cells):
            return cell.steps

        def pictures(self, cell, plan):
            self.made += (cell.name,)
            return np.full((2, 1, 1, 3), plan, np.uint8)

    demo = FakeDemo()
    assert sampling.sample(demo, [Cell("a", steps=3), Cell("b 0.1", steps=5)], tmp_path)["a"][0] == 3
    found = sampling.sample(demo, [Cell("a", steps=3), Cell("b 0.1", steps=6)], tmp_path)
    assert demo.made == ("a", "b 0.1", "b 0.1")
    assert [int(pictures.max()) for _, pictures in found.values()] == [3, 6]
