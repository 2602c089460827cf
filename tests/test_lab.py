"""JupyterLab in a real browser opens a page and runs it."""
import pytest


@pytest.mark.browser
def test_a_page_runs_in_jupyterlab(browser, lab):
    page = lab.open(browser, "00_core/04_ragged.ipynb")
    lab.run_all(page)
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
    assert prompts and all(prompt.strip("[]: ") for prompt in prompts), "every code cell has run"
    assert page.locator(".jp-OutputArea-output img").count() > 0
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    page.close()
