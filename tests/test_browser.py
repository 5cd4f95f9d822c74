"""The page to try the service on, and pages of other origins, in a real browser."""

import shutil
from typing import Any
from urllib.parse import urlencode

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from conftest import serve
from test_service import FORM, JSON, LOGIN, PASSWORD

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]


class Browser(webdriver.Chrome):
    """A headless Chromium that finds no host but 127.0.0.1, and complains of others."""

    def open(self, url: str, width: int = 1280) -> None:
        """A page; a narrow one as a phone shows it, viewport line and all."""
        self.complaints()  # those of the test before
        size = {"width": width, "height": 1600, "deviceScaleFactor": 1}
        screen = size | {"mobile": width < 600}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.get(url)

    def see(self, css: str, text: str = "") -> Any:
        """The first element that is displayed and holds the text, once there is one."""

        def find(browser: Browser) -> Any:
            found = browser.find_elements(By.CSS_SELECTOR, css)
            shown = (each for each in found if each.is_displayed())
            return next((each for each in shown if text in each.text), None)

        return WebDriverWait(self, 20, 0.02, [StaleElementReferenceException]).until(
            find
        )

    def type(self, css: str, text: str) -> None:
        self.see(css).send_keys(Keys.CONTROL, "a")  # clear() would not reach React
        self.see(css).send_keys(text)

    def run(self, script: str, *arguments: Any) -> Any:
        """What this async function's body returns, or the name of what it throws."""
        return self.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{{script}}})(...arguments)"
            ".then(done, error => done(error.name))",
            *arguments,
        )

    def complaints(self) -> list[str]:
        """What the console says since the last call: errors, violations of policies."""
        entries = self.get_log("browser")
        bad = ("SEVERE", "WARNING")
        return [entry["message"] for entry in entries if entry["level"] in bad]


@pytest.fixture(scope="session")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Browser(options, webdriver.ChromeService(driver)) as running:
        yield running


@pytest.fixture(scope="module", params=["", "/api"])
def site(request):
    """A service at the root, and one mounted under a prefix."""
    with serve(SCRIPT_NAME=request.param) as running:
        yield running


def test_people_log_in_and_create_a_todo(browser, site):
    assert site("POST /users", username="alice", password=PASSWORD).status == 201
    browser.open(site.url + "/")
    assert browser.current_url == site.url + "/docs"
    browser.see("#swagger-ui .info .title", "To-do service")
    browser.see("#swagger-ui .version-stamp .version", "OAS 3.1")

    browser.see("#swagger-ui .scheme-container button.btn.authorize").click()
    form = "#swagger-ui .modal-ux .auth-container:has(#oauth_username)"
    browser.type(f"{form} #oauth_username", "alice")
    browser.type(f"{form} #oauth_password", PASSWORD)
    browser.see(f"{form} .auth-btn-wrapper button.authorize").click()
    browser.see("#swagger-ui .modal-ux .auth-container h6", "Authorized")
    browser.see("#swagger-ui .modal-ux button.btn-done").click()

    create = "#swagger-ui [id$=post_todos]"
    browser.see(f"{create} .opblock-summary-control").click()
    browser.see(f"{create} button.try-out__btn").click()
    browser.type(f"{create} textarea.body-param__text", '{"task": "buy milk"}')
    browser.see(f"{create} button.execute").click()
    answer = f"{create} .live-responses-table tr.response"
    browser.see(f"{answer} .response-col_status", "201")
    browser.see(f"{answer} pre.microlight", "buy milk")

    assert browser.complaints() == []
    token = site.log_in("alice")["access_token"]
    assert site("GET /todos/todo4", token).json == {"task": "buy milk"}


def test_an_operation_is_ready_to_run_as_filled(browser, site):
    """What is filled in names an item, and no precondition that would fail."""
    browser.open(site.url + "/docs")
    update = "#swagger-ui [id$=patch_todos_id]"
    browser.see(f"{update} .opblock-summary-control").click()
    browser.see(f"{update} button.try-out__btn").click()
    for name in ("If-Match", "If-None-Match"):
        field = browser.see(f'{update} tr[data-param-name="{name}"] input')
        assert field.get_attribute("value") == ""
    body = browser.see(f"{update} textarea.body-param__text").get_attribute("value")
    assert "task" in body
    assert browser.complaints() == []


def test_a_phone_shows_the_page_in_its_own_width(browser, site):
    browser.open(site.url + "/docs", width=390)
    browser.see("#swagger-ui .info .title", "To-do service")
    browser.see("#swagger-ui [id$=post_todos]")
    script = "return [innerWidth, document.documentElement.scrollWidth]"
    assert browser.run(script) == [390, 390]


# ---- Pages of other origins ---------------------------------------------------------

FETCH = """
const [url, method, body, headers] = given
const answer = await fetch(url, {method, body, headers})
const text = await answer.text()
return [answer.status, text && JSON.parse(text), Object.fromEntries(answer.headers)]
"""


def test_a_page_of_a_listed_origin_works_and_no_other(browser):
    with (
        serve() as listed,
        serve() as other,
        serve(SERVICE_CORS_ORIGINS=listed.url) as server,
    ):
        form, bearer = {"Content-Type": FORM}, {"Content-Type": JSON, "X-Trace": "7"}

        def ask(line, body=None, headers=bearer):
            method, path = line.split()
            return browser.run(FETCH, server.url + path, method, body, headers)

        server.user("alice")
        browser.open(f"{listed.url}/health")
        token = ask("POST /token", urlencode(LOGIN), form)[1]["access_token"]
        bearer["Authorization"] = f"Bearer {token}"
        status, _, created = ask("POST /todos", '{"task": "from afar"}')
        assert status == 201
        todo, known = created["location"], bearer | {"If-Match": created["etag"]}
        change = (f"PATCH {todo}", '{"task": "changed"}', known)
        assert ask(*change)[:2] == [200, {"task": "changed"}]
        assert ask(*change)[0] == 412
        assert ask(f"DELETE {todo}")[0] == 204
        status, _, refused = ask("GET /todos", None, form)
        assert (status, refused["www-authenticate"][:14]) == (401, 'Bearer realm="')
        assert not [line for line in browser.complaints() if "CORS" in line]

        browser.open(f"{other.url}/health")
        for line in ("GET /health", "PUT /todos/x", "POST /token"):
            assert ask(line) == "TypeError"  # no answer for this page
        assert [line for line in browser.complaints() if "CORS" in line]
