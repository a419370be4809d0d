"""The page in a real browser: a picture is asked for, grows, and is made again."""

import shutil

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from jaxspd.media.metadata import read_request
from tests.serving import serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
PROMPT = "a serene mountain lake at noon"
# Notes the width and the words of every look.
LISTEN = """
window.seen = [];
const look = document.getElementById("look");
const fact = (name) => document.getElementById(`fact-${name}`).textContent;
const facts = () => [fact("grid"), fact("stage"), Number(fact("sigma"))];
look.addEventListener("load", () => seen.push([look.naturalWidth, ...facts()]));
"""
# What has no name for who cannot see it.
UNNAMED = """
return [...document.querySelectorAll("input, textarea, button, a")]
  .filter((e) => e.offsetParent && !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
  .map((e) => e.outerHTML);
"""


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def saved(browser, folder):
    """The newest picture of the gallery, downloaded."""
    place = {"behavior": "allow", "downloadPath": str(folder)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", place)
    browser.find_element(By.CSS_SELECTOR, "#gallery li:first-child a").click()
    path = folder / "a-serene-mountain-lake-at-noon_7.png"
    WebDriverWait(browser, 30).until(lambda _: path.exists())
    return path


def test_a_picture_grows_and_is_made_again_exactly(toy_generator, browser, tmp_path):
    def until(count):
        WebDriverWait(browser, 240).until(
            lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#gallery li")) == count
        )

    with serving(toy_generator) as served:
        browser.get(served.url)
        WebDriverWait(browser, 30).until(lambda _: browser.find_element(By.ID, "width").get_property("value"))
        browser.execute_script(LISTEN)
        # With the keyboard alone, in the order of the page.
        assert browser.switch_to.active_element.get_attribute("id") == "prompt"
        speed = [Keys.TAB, Keys.ARROW_LEFT]  # from fast to high
        seed = [*[Keys.TAB] * 3, "7"]
        own = [Keys.TAB, Keys.ENTER, Keys.TAB, "20", Keys.TAB, "2", Keys.TAB, "0.1"]
        for key in (PROMPT, *speed, *seed, *own, Keys.CONTROL + Keys.ENTER + Keys.NULL):
            browser.switch_to.active_element.send_keys(key)
        until(1)
        seen = browser.execute_script("return seen")
        assert [width for width, *_ in seen] == sorted(width for width, *_ in seen)
        assert {tuple(facts) for *facts, _ in seen} == {
            (6, "6×4", "1 of 3"),
            (12, "12×8", "2 of 3"),
            (24, "24×16", "3 of 3"),
        }
        assert seen[-1][3] < seen[0][3] < 1
        large = browser.find_element(By.CSS_SELECTOR, "#made img")
        assert large.get_property("naturalWidth") == 48
        assert browser.find_element(By.ID, "fact-step").text == "20 of 20"
        assert large.get_attribute("alt") == PROMPT
        assert browser.find_element(By.ID, "news").text == f"It is made: {PROMPT}"
        request = read_request(saved(browser, tmp_path / "grown"))
        asked = {"prompt": PROMPT, "num_inference_steps": 20, "seed": 7, "scheduler": "unipc"}
        assert request.items() >= {**asked, "progressive_levels": 2, "progressive_delta": 0.1}.items()

        browser.find_element(By.XPATH, "//button[text()='same seed, exact']").click()
        until(2)
        exact = saved(browser, tmp_path / "exact")
        ask = {"prompt": PROMPT, "seed": 7}
        (mine,) = toy_generator.generate(ask, save_output=False, show_progress=False).frames
        np.testing.assert_array_equal(np.asarray(Image.open(exact)), mine[0])

        # What cannot be made is told, in the server's words.
        browser.find_element(By.ID, "seed").send_keys("0" * 3 + str(2**64))
        browser.find_element(By.ID, "make").click()
        error = browser.find_element(By.ID, "error")
        WebDriverWait(browser, 30).until(lambda _: error.text)
        assert f"must be 18446744073709551615 or less, not 7000{2**64}" in error.text
        assert browser.find_element(By.ID, "empty").is_displayed()

        names = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert all(name.startswith((served.url, "blob:")) for name in names)
        assert browser.execute_script(UNNAMED) == []
    errors = [line for line in browser.get_log("browser") if "400 (Bad Request)" not in line["message"]]
    assert errors == []


def test_the_page_asks_for_the_key(toy_generator, browser):
    with serving(toy_generator, api_key="secret") as served:
        browser.get(served.url)
        key = browser.find_element(By.ID, "key")
        WebDriverWait(browser, 30).until(lambda _: key.is_displayed())
        assert "--api-key" in browser.find_element(By.ID, "error").text
        browser.find_element(By.ID, "prompt").send_keys(" ")
        key.send_keys("secret" + Keys.ENTER)
        WebDriverWait(browser, 30).until(lambda _: browser.find_element(By.ID, "width").get_property("value"))
        assert not key.is_displayed()
