"""The page to try the service on, and pages of other origins, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conftest import Browser, Canned, page, serve
from test_service import PASSWORD


@pytest.fixture(scope="module", params=["", "/api"])
def site(request: pytest.FixtureRequest) -> Iterator[serve]:
    """A service at the root, and one mounted under a prefix."""
    with serve(SCRIPT_NAME=request.param) as running:
        yield running


def test_people_log_in_and_create_a_todo(browser: Browser, site: serve) -> None:
    assert site("POST /users", username="alice", password=PASSWORD).status == 201
    browser.open(site.url + "/")
    assert browser.driver.current_url == site.url + "/docs", (
        "GET / sends browsers there"
    )
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
    assert browser.hosts() == {f"127.0.0.1:{site.port}"}
    token = site.log_in("alice")["access_token"]
    assert site("GET /todos/todo4", token).json == {"task": "buy milk"}


def test_an_operation_is_ready_to_run_as_filled(browser: Browser, site: serve) -> None:
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


def test_a_phone_shows_the_page_in_its_own_width(browser: Browser, site: serve) -> None:
    browser.open(site.url + "/docs", width=390)
    browser.see("#swagger-ui .info .title", "To-do service")
    browser.see("#swagger-ui [id$=post_todos]")
    script = "return [innerWidth, document.documentElement.scrollWidth]"
    assert browser.run(script) == [390, 390]


# ---- Pages of other origins ---------------------------------------------------------


HTML = "Content-Type: text/html"
EMPTY = page(b'<!doctype html><link rel="icon" href="data:,">', "200 OK", HTML)
CLIENT = """
const [api, username, password] = given
const credentials = {grant_type: "password", username, password}
const post = (path, body) => fetch(api + path, {method: "POST", body})
const login = await post("/token", new URLSearchParams(credentials))
const {access_token} = await login.json()
const headers = {
  "Authorization": "Bearer " + access_token, "Content-Type": "application/json",
  "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}
const body = JSON.stringify({task: "from afar"})
const created = await fetch(api + "/todos", {method: "POST", headers, body})
const url = api + created.headers.get("Location")
const conditional = {...headers, "If-Match": created.headers.get("ETag")}
const change = {method: "PATCH", headers: conditional, body: '{"task": "changed"}'}
const changed = await fetch(url, change)
const stale = await fetch(url, change)
const page = await fetch(api + "/todos?limit=1", {headers})
const missing = await fetch(api + "/todos/todo9", {headers})
const refused = await fetch(api + "/todos")
const deleted = await fetch(url, {method: "DELETE", headers})
const revoked = await post("/revoke", new URLSearchParams({token: access_token}))
const wrong = new URLSearchParams({...credentials, password: "wrong"})
let throttled = {status: 0}
while (throttled.status != 429) throttled = await post("/token", wrong)
const answers = [created, changed, stale, page, missing, refused, deleted, revoked]
return [
  answers.map(answer => answer.status), await changed.json(), await missing.json(),
  await revoked.json(), page.headers.get("Link"),
  refused.headers.get("WWW-Authenticate"), throttled.headers.get("Retry-After"),
]
"""


def test_a_page_of_a_listed_origin_works_and_no_other(browser: Browser) -> None:
    with (
        Canned(lambda: EMPTY) as listed,
        Canned(lambda: EMPTY) as other,
        serve(SERVICE_CORS_ORIGINS=listed.url) as server,
    ):
        server("POST /users", username="alice", password=PASSWORD)
        arguments = [server.url, "alice", PASSWORD]
        browser.open(listed.url)
        told = browser.run(CLIENT, *arguments)
        statuses, changed, missing, revoked, link, challenge, wait = told
        assert statuses == [201, 200, 412, 200, 404, 401, 204, 200]
        assert (changed, revoked) == ({"task": "changed"}, {})
        assert missing == {"message": "Todo todo9 doesn't exist"}
        assert 'rel="next"' in link
        assert challenge.startswith("Bearer realm=")
        assert int(wait) >= 1
        assert not [line for line in browser.complaints() if "CORS" in line]

        browser.open(other.url)
        assert browser.run(CLIENT, *arguments) == "TypeError", "no answer for the page"
        assert [line for line in browser.complaints() if "CORS" in line]
        script = "return (await fetch(given[0] + '/todos', {method: 'PUT'})).status"
        assert browser.run(script, *arguments) == "TypeError"
