"""What needs a graphics adapter: the pages' cells marked `fury`, and slices that lie where they should, whatever the affine."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.fury
ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in sorted(ROOT.glob("nbs/**/*.ipynb")) if '"#| fury' in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_cells_marked_fury(page):
    "Run in a process of its own: a failure must not break the graphics of the next test."
    done = subprocess.run([Path(sys.executable).with_name("nbdev_test"), "--path", page, "--n_workers", "0", "--flags", "fury"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Success." in done.stdout, done.stdout + done.stderr


def turn(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


MATRICES = {"diagonal": np.diag([2., 2, 2]), "left-handed": np.diag([-2., 2, 2]), "anisotropic": np.diag([1.5, 2, 3]),
            "swapped": np.array([[0., -2, 0], [2, 0, 0], [0, 0, 2.5]]), "oblique": turn(20) @ np.diag([2., 2, 2])}


@pytest.mark.parametrize("drawn_by", ["stage", "painter"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_bright_voxel_is_drawn_where_it_is(name, drawn_by):
    "Of a volume with one bright blob, off centre, the brightest pixels lie where its world coordinates project to."
    from dwiml_nb.viz.painter import frame_of, paint_slices
    from dwiml_nb.viz.scene import Scene
    from dwiml_nb.viz.stage import Stage
    affine = np.eye(4)
    affine[:3, :3] = MATRICES[name]
    affine[:3, 3] = 7, -11, 5
    at, index = np.array([13, 5, 8]), np.indices((20, 16, 14))
    volume = np.exp(-((index - at[:, None, None, None])**2).sum(0)/4)
    world = affine[:3, :3] @ at + affine[:3, 3]
    scene = Scene().add_slices(volume, affine, position_mm=world, planes="z")
    if drawn_by == "stage":
        stage = Stage(scene, (500, 400))
        stage.stand(frame_of(scene, "axial", (500, 400)))
        picture, expected = stage.draw().astype(float), stage.project(world[None])[0]
        mm = np.linalg.norm(stage.project((world + [1, 0, 0])[None])[0] - expected)
        stage.close()
    else:
        frame = frame_of(scene, "axial", (500, 400))
        picture, expected, mm = np.zeros((400 * 500, 3)), frame.project(world[None])[0], frame.scale
        paint_slices(picture, np.full(400 * 500, -np.inf), scene.slices[0], frame)
        picture = picture.reshape(400, 500, 3)
    grey = np.where(picture.min(2) == 255, 0, picture.mean(2)) if drawn_by == "stage" else picture.mean(2)
    grey = np.where(near(grey.shape, expected, 8*mm), grey, 0)
    y, x = np.argwhere(grey > .9*grey.max()).mean(0) + .5
    assert np.hypot(*(np.array([x, y]) - expected)) < .35*mm + 1


def near(shape, pixel, radius):
    "Pixels within a radius."
    y, x = np.indices(shape) + .5
    return np.hypot(x - pixel[0], y - pixel[1]) < radius
