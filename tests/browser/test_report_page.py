"""A report in a browser: the slider says whose lines are drawn, nothing is asked for, and paper has pictures."""
import pytest

from dwiml_nb.widgets.report import report_run

RUN = """
[data]
hdf5_file = "study.hdf5"
input_group_name = "input"
streamline_group_name = "bundles"
[model]
rnn_layer_sizes = [4]
step_size = 2.0
[training]
experiments_path = "experiments"
experiment_name = "told"
max_epochs = 2
max_batches_per_epoch_training = 1
[tracking]
tracking_mask_group = "wm_mask"
min_length_mm = 0.0
[[logging.sinks]]
key = "epoch_tracks"
nb_seeds = 8
"""


@pytest.mark.browser
def test_a_report_turns_chooses_and_prints(here, browser):
    report = report_run(here / "experiments" / "told")
    page, asked, wrong = browser.new_page(), [], []
    page.set_viewport_size({"width": 820, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(report.as_uri())
    drawn = "[...window.dwimlStages ?? []].map(o => o.model.get('shown').map(s => s.some(v => v)))"
    page.wait_for_function(f"JSON.stringify({drawn}) === '[[false,true]]'")
    words = page.locator(".dwiml-epochs [data-epoch]").filter(visible=True)
    assert words.count() == 1 and words.inner_text().startswith("epoch 2: ")
    page.locator(".dwiml-epochs input").fill("0")
    page.wait_for_function(f"JSON.stringify({drawn}) === '[[true,false]]'")
    assert words.count() == 1 and words.inner_text().startswith("epoch 1: ")
    assert page.evaluate("document.documentElement.scrollWidth") == 820
    assert page.locator(".dwiml-on-paper").filter(visible=True).count() == 0
    page.emulate_media(media="print")
    assert page.locator(".dwiml-on-paper").filter(visible=True).count() == 1 and not page.locator(".dwiml-turns").is_visible()
    assert asked == [report.as_uri()] and wrong == []
    page.close()
