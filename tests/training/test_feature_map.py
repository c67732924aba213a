import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.decomposition import PCA

from training import feature_map
from training.feature_map import draw_feature_map, principal_plane

TEMPLATE = (Path(feature_map.__file__).parent / "report.html.j2").read_text(encoding="utf-8")


def features(count: int, width: int = 7) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    rng = np.random.default_rng(5)
    return (rng.normal(size=(count, width)) * np.arange(1, width + 1)).astype(np.float32)


def test_the_plane_is_that_of_scikit_learn() -> None:
    points = features(23)
    places, share = principal_plane(points)
    witness = PCA(2, svd_solver="full")
    expected = witness.fit_transform(points.astype(np.float64))
    signs = np.sign((places * expected).sum(axis=0))
    np.testing.assert_allclose(places, expected * signs, atol=1e-6)
    assert share == pytest.approx(witness.explained_variance_ratio_.sum())


def test_every_image_has_a_mark_of_its_class() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, 6], dtype=np.int64)
    names = ["cat", "dog & <b>wolf</b>", *"owls"]
    names.append("yak")
    found = draw_feature_map({"Before": features(7), "After": features(7) ** 2}, labels, names)
    assert len(found.panels) == 2
    for panel in found.panels:
        root = ElementTree.fromstring(panel.svg)
        assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", panel.alt)
        assert "7 test images of 7 classes" in panel.alt
        counts = {path.findtext("title"): path.attrib["d"].count("M") for path in root.iter("path")}
        assert counts == {"cat": 3, "dog & <b>wolf</b>": 1, "o": 2, "yak": 1}
        corners = re.findall(r"M([\d.]+) ([\d.]+)", panel.svg)
        assert all(0 <= float(value) <= 320 for corner in corners for value in corner)
    assert [name for _, name in found.legend] == names
    assert found.others == 0


def test_twenty_classes_have_twenty_marks_and_the_rest_is_grey() -> None:
    names = [str(label) for label in range(23)]
    labels = np.arange(23, dtype=np.int64)
    found = draw_feature_map({"Now": features(23)}, labels, names)
    assert len({mark for mark, _ in found.legend}) == 20
    assert found.others == 3
    assert found.panels[0].svg.count('class="class-other"') == 3


def test_features_that_do_not_differ_are_no_error() -> None:
    same = np.ones((5, 4), dtype=np.float32)
    found = draw_feature_map({"Now": same}, np.zeros(5, dtype=np.int64), ["one"])
    assert "nan" not in found.panels[0].svg


def simulated(colour: str, kind: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """CIELAB of a colour as someone without red or green cones sees it (Vienot et al. 1999)."""
    srgb = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    lms = to_lms @ linear
    if kind == "protan":
        lms[0] = 2.02344 * lms[1] - 2.52581 * lms[2]
    elif kind == "deutan":
        lms[1] = 0.494207 * lms[0] + 1.24827 * lms[2]
    linear = np.clip(np.linalg.solve(to_lms, lms), 0, 1)
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
        / (0.9505, 1.0, 1.089)
    )
    cubic = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * cubic[1] - 16, 500 * (cubic[0] - cubic[1]), 200 * (cubic[1] - cubic[2])])


@pytest.mark.parametrize("kind", ["common", "protan", "deutan"])
def test_any_two_colours_can_be_told_apart(kind: str) -> None:
    schemes = re.findall(r":root \{(.*?)\}", TEMPLATE, flags=re.DOTALL)
    assert len(schemes) == 3
    for scheme in schemes:
        colours = re.findall(r"--class-\d: (#[0-9a-f]{6}|#000)", scheme)
        assert len(colours) == feature_map.COLOURS
        full = [colour if len(colour) == 7 else "#000000" for colour in colours]
        seen = [simulated(colour, kind) for colour in full]
        for one, other in itertools.combinations(range(len(seen)), 2):
            distance = float(np.linalg.norm(seen[one] - seen[other]))
            assert distance > 15, (kind, full[one], full[other], distance)
