"""Programs of others: who verifies our keys, what we guard, who logs in, who hosts us.

Keys are made by openssl, issuers are real servers on loopback. Forgeries are made with
hmac and base64 alone: no library mends what is to be broken.
"""

import base64
import hmac
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flask
import jwt
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from joserfc import jwt as jose
from joserfc.jwk import KeySet, import_key
from oauthlib.oauth2 import LegacyApplicationClient
from oauthlib.oauth2.rfc6749.errors import InvalidGrantError
from requests_oauthlib import OAuth2Session as RequestsSession

from conftest import ROOT, Canned, eventually, free_port, page, serve
from service import Argument, RequestParser, Resource, Route
from test_service import (
    BAD_TOKEN,
    FORM,
    ISSUER,
    JSON,
    MULTIPART,
    PASSWORD,
    SECRET,
    TRANSCRIPT,
    Guarded,
    User,
    World,
    answer_to_bearer,
    each,
    encoded,
    mac,
    opened,
    seen_by,
    together,
)

SHOP = "https://shop.example"  # another service, which a login opens too
JWKS = "GET /.well-known/jwks.json"


# ---- Keys ---------------------------------------------------------------------------


class Kind(NamedTuple):
    """How a key is made, its type in a JWK, and the algorithm that it signs with."""

    command: str
    type: Any
    algorithm: str


EC = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
KINDS = {
    "Ed25519": Kind("openssl genpkey -algorithm ed25519", "OKP", "EdDSA"),
    "P-256": Kind(EC, "EC", "ES256"),
    "RSA": Kind("openssl genrsa 3072", "RSA", "RS256"),
    "old RSA": Kind("openssl genrsa -traditional 2048", "RSA", "RS256"),
}


def output(command: str) -> bytes:
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    return done.stdout


@cache
def key_of(name: str) -> Any:
    """The private key of this name: its kind, and # and a word for another one."""
    kind = KINDS[name.partition("#")[0]]
    return import_key(b"A line of explanation\n" + output(kind.command), kind.type)


def files(folder: Path, *names: str) -> str:
    """The value of SERVICE_SIGNING_KEY_FILE for the keys of these names."""
    for name in names:
        (folder / f"{name}.pem").write_bytes(key_of(name).original_value)
    return ",".join(f"{folder}/{name}.pem" for name in names)


def signing(folder: Path, *names: str, **options: Any) -> World:
    """A service that signs with the keys of these names, for itself and for a shop."""
    audience = f"{ISSUER},{SHOP}"
    return World(signing_key_file=files(folder, *names), audience=audience, **options)


def signed(header: Any, claims: Any, sign: Callable[[bytes], bytes]) -> str:
    text = ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
    return f"{text}.{encoded(sign(text.encode()))}"


def hs256(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda text: hmac.digest(secret, text, "sha256")


# ---- Signing keys -------------------------------------------------------------------


@each("kind", KINDS)
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # which joserfc still reads
def test_a_key_signs_tokens_that_others_verify(tmp_path, kind):
    world, key, algorithm = signing(tmp_path, kind), key_of(kind), KINDS[kind].algorithm
    keys, token, kid = world(JWKS), world.user().access_token, key.thumbprint()
    members = {"kid": kid, "use": "sig", "alg": algorithm}
    assert keys.json == {"keys": [key.as_dict(private=False) | members]}
    assert keys.headers["Cache-Control"] == "max-age=300"
    header, claims = opened(token)
    assert header == {"alg": algorithm, "typ": "at+jwt", "kid": kid}
    assert (claims["sub"], claims["aud"]) == ("alice", [ISSUER, SHOP])
    assert answer_to_bearer(world, token) == "200"

    jose_keys = KeySet.import_key_set(keys.json)
    assert jose.decode(token, jose_keys, [algorithm]).claims == claims
    jwt_key = jwt.PyJWKSet.from_dict(keys.json)[kid]
    times = {"verify_iat": False, "verify_exp": False}  # our clock is our own
    assert jwt.decode(token, jwt_key, audience=SHOP, options=times) == claims


@each("kind", KINDS)
def test_refresh_tokens_stay_with_the_secret(tmp_path, kind):
    alice, algorithm = signing(tmp_path, kind).user(), KINDS[kind].algorithm
    header, claims = opened(alice.refresh_token)
    assert (header["alg"], header["typ"]) == ("HS256", "rt+jwt")
    text, _, signature = alice.refresh_token.rpartition(".")
    assert signature == mac(text)
    header |= {"alg": algorithm, "kid": key_of(kind).thumbprint()}
    forged = jwt.encode(claims, key_of(kind).private_key, algorithm, header)
    assert alice.world.refresh(forged).json["error"] == "invalid_grant"
    assert opened(alice.refresh().access_token)[0]["alg"] == algorithm


def test_keys_are_rotated_without_one_refused_request_but_the_first(tmp_path):
    """Who has a token by the secret has to refresh it, and need not log in."""
    alice, was_in = World().user(), []
    first = alice.world
    for names in (["P-256"], ["P-256", "RSA"], ["RSA", "P-256", "RSA"], ["RSA"]):
        world = signing(tmp_path, *names, store=first.store, clock=first.clock)
        published = [key["kid"] for key in world(JWKS).json["keys"]]
        assert published == [key_of(name).thumbprint() for name in dict.fromkeys(names)]
        alice = User(world, "alice", alice.pair)
        was_in.append(alice.is_in)
        alice = alice.refresh()
        assert alice.is_in
        assert opened(alice.access_token)[0]["kid"] == published[0]
    assert was_in == [False, True, True, True]
    back = User(first, "alice", alice.pair)
    assert answer_to_bearer(first, back.access_token) == BAD_TOKEN
    assert back.refresh().is_in


FAULTS = {
    "RSA of 1024 bits": "openssl genrsa -traditional 1024",
    "RSA of 2047 bits": "openssl genrsa 2047",
    "P-384": "openssl ecparam -name secp384r1 -genkey -noout",
    "secp256k1": "openssl ecparam -name secp256k1 -genkey -noout",
    "Ed448": "openssl genpkey -algorithm ed448",
    "SM2": "openssl genpkey -algorithm SM2",
    "encrypted": "openssl genpkey -algorithm ed25519 -aes256 -pass pass:word",
    "encrypted, old form": "openssl genrsa -traditional -aes256 -passout pass:word",
    "public": "openssl genpkey -algorithm ed25519 | openssl pkey -pubout",
    "DER": "openssl genpkey -algorithm ed25519 -outform DER",
    "empty": "true",
    "garbage": "head -c 99 /dev/urandom",
    "cut off": "openssl genrsa 2048 | head -c 500",
    "hollow": "echo -----BEGIN PRIVATE KEY-----; echo -----END PRIVATE KEY-----",
}


@each("fault", FAULTS)
def test_a_bad_key_is_a_line_with_variable_and_file(tmp_path, fault):
    path = tmp_path / "key.pem"
    path.write_bytes(output(FAULTS[fault]))
    for bad in (path, tmp_path / "missing.pem", tmp_path, tmp_path / ("x" * 300)):
        for value in (f"{bad}", f"{files(tmp_path, 'Ed25519')},{bad}"):
            line = rf"^SERVICE_SIGNING_KEY_FILE .*{re.escape(f'{bad}')}.*\Z"
            with pytest.raises(ValueError, match=line):
                World(signing_key_file=value)


# ---- The guard, with keys from afar -------------------------------------------------


class Shop(Guarded):
    """Another app behind a guard, the server of its keys, and a service to log in."""

    def __init__(self, login: World, issuer: Canned) -> None:
        self.login, self.issuer, self.later = login, issuer, 0.0
        self.guard(issuer.url)

    def guard(self, url: str) -> None:
        """Put a new guard, which knows no keys, before the app."""
        super().__init__(self.login.clock, audience=SHOP, secret=None, jwks_url=url)

    def wait(self, seconds: float) -> None:
        """By both clocks: PyJWT keeps keys by the machine's own."""
        self.later += seconds
        self.login.clock.step(seconds)


@pytest.fixture
def shop(request, tmp_path, monkeypatch):
    login = signing(tmp_path, getattr(request, "param", "Ed25519"))
    with Canned(lambda: page(shop.login(JWKS).body)) as issuer:
        shop, real = Shop(login, issuer), time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + shop.later)
        yield shop


def test_a_login_opens_the_shop_until_an_access_life_after_the_logout(shop):
    alice = shop.login.user("alice", roles=["operator"])
    user, _, _, claims = seen_by(shop, alice).json
    assert (user, claims["roles"]) == ("alice", ["operator"])
    assert claims == opened(alice.access_token)[1]
    shop.login("POST /revoke", form={"token": alice.access_token})
    assert not alice.is_in
    shop.login.clock.step(899)
    assert seen_by(shop, alice).status == 200  # it knows keys, and no sessions
    shop.login.clock.step(1)
    assert seen_by(shop, alice).status == 401
    by_secret = World(audience=SHOP, clock=shop.login.clock).user()
    assert answer_to_bearer(shop, by_secret.access_token) == BAD_TOKEN


def test_keys_are_fetched_once_when_needed_and_kept_for_300_seconds(shop):
    for junk in ("junk", "a.b.c"):
        assert answer_to_bearer(shop, junk) == BAD_TOKEN
    assert shop("GET /").status == 401
    assert shop.issuer.agents == []
    alice = shop.login.user()
    assert together(20, lambda n: seen_by(shop, alice).status) == [200] * 20
    for seconds, fetches in ((1, 1), (290, 1), (10, 2), (10, 2)):
        shop.wait(seconds)
        alice = alice.refresh()
        assert seen_by(shop, alice).status == 200
        assert len(shop.issuer.agents) == fetches
    assert "Python-urllib" not in "".join(shop.issuer.agents)
    shop.issuer.reply = lambda: page(b"", "502 Bad Gateway")
    shop.wait(270)  # an issuer that is away for less is not missed
    assert seen_by(shop, alice.refresh()).status == 200


def test_a_flood_of_unknown_kids_is_no_flood_of_fetches(shop):
    alice = shop.login.user()
    header, claims = opened(alice.access_token)
    assert seen_by(shop, alice).status == 200
    for minute in (1, 2, 3):
        shop.wait(60)
        for number in range(50):
            unknown = header | {"kid": f"unknown {minute} {number}"}
            forged = signed(unknown, claims, hs256(b""))
            assert answer_to_bearer(shop, forged) == BAD_TOKEN
        assert len(shop.issuer.agents) == 1 + minute
    assert seen_by(shop, alice).status == 200


def test_a_rotated_key_is_found_an_old_one_forgotten(shop, tmp_path):
    old, store, clock = shop.login.user(), shop.login.store, shop.login.clock
    assert seen_by(shop, old).status == 200
    shop.login = signing(tmp_path, "P-256", store=store, clock=clock)
    shop.wait(60)
    assert seen_by(shop, shop.login.log_in()).status == 200
    shop.wait(301)
    assert seen_by(shop, old).status == 401


def test_an_unreachable_issuer_is_503_until_it_is_back(shop):
    alice, port = shop.login.user(), free_port()
    shop.guard(f"http://127.0.0.1:{port}")
    away = seen_by(shop, alice)
    assert (away.status, [*away.json]) == (503, ["message"])
    assert "WWW-Authenticate" not in away.headers
    assert (shop("GET /").status, shop("GET /health").status) == (401, 200)
    with Canned(shop.issuer.reply, port):
        shop.wait(int(away.headers["Retry-After"]))
        assert seen_by(shop, alice).status == 200


def key_set(*keys: Any) -> bytes:
    return page(json.dumps({"keys": keys}).encode())


JUNK = {
    "nothing": b"",
    "cut off": b'HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\n{"keys": [',
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "not found": page(b'{"keys": []}', "404 Not Found"),
    "html": page(b"<!doctype html>"),
    "not UTF-8": page(b"\xff\xfe{}"),
    "nested": page(b"[" * 200_000),
    "no keys": page(b"{}"),
    "empty": page(b'{"keys": []}'),
    "keys a number": page(b'{"keys": 5}'),
    "key without kty": key_set({"kid": "x", "x": "AA"}),
    "key with a list for kty": key_set({"kty": [], "kid": "x"}),
    "half a point": key_set({"kty": "EC", "crv": "P-256", "kid": "x", "x": "A"}),
    "key with alg none": key_set({"kty": "OKP", "kid": "x", "alg": "none"}),
}


@each("junk", JUNK)
def test_a_key_set_that_is_none_is_503(shop, junk):
    shop.issuer.reply = lambda: JUNK[junk]
    answer = seen_by(shop, shop.login.user())
    assert (answer.status, "Retry-After" in answer.headers) == (503, True)


def test_of_many_who_come_while_there_are_no_keys_few_ask_for_them(shop):
    shop.issuer.reply, alice = (lambda: b""), shop.login.user()
    assert together(8, lambda _: seen_by(shop, alice).status) == [503] * 8
    assert len(shop.issuer.agents) < 4


def test_junk_while_the_issuer_is_silent_keeps_nobody_else_waiting(shop):
    alice = shop.login.user()
    assert seen_by(shop, alice).status == 200
    shop.wait(11)  # the cooldown of a kid that is not known
    shop.issuer.reply = lambda: b""
    junk = signed({"alg": "EdDSA", "typ": "at+jwt", "kid": "x"}, {}, lambda _: b"x")
    for _ in range(3):
        assert shop("GET /", authorization=f"Bearer {junk}").status == 503
        assert seen_by(shop, alice).status == 200
    assert len(shop.issuer.agents) == 2
    shop.issuer.reply = lambda: page(b"<!doctype html>")
    shop.wait(11)
    assert shop("GET /", authorization=f"Bearer {junk}").status == 503


def test_keys_come_over_http_from_the_very_url_that_was_given(shop):
    with Canned(lambda: b"") as elsewhere:
        there = f"Location: {elsewhere.url}"
        shop.issuer.reply = lambda: page(b"", "302 Found", there)
        assert seen_by(shop, shop.login.user()).status == 503
        assert elsewhere.agents == []
    with pytest.raises((ValueError, jwt.PyJWTError)):
        shop.guard("file:///etc/passwd")


@pytest.mark.filterwarnings("ignore:Key size", "ignore::jwt.InsecureKeyLengthWarning")
def test_symmetric_weak_and_unfit_keys_of_a_key_set_verify_nothing(shop):
    good, secret = key_of("Ed25519"), import_key("s" * 32, "oct")
    curve = import_key(output(FAULTS["P-384"]), "EC")
    weak = import_key(output(FAULTS["RSA of 1024 bits"]), "RSA")
    claims = opened(shop.login.user().access_token)[1]
    cases: list[tuple[Any, str, dict[str, str]]] = [
        # the key, the algorithm that it is used with, and what its set says of it
        (secret, "HS256", {}),
        (secret, "HS256", {"alg": "HS256"}),
        (secret, "HS256", {"alg": "EdDSA"}),
        (weak, "RS256", {}),
        (curve, "ES384", {}),
        (curve, "ES384", {"alg": "ES256"}),
        (good, "EdDSA", {"use": "enc"}),
        (good, "EdDSA", {"kid": ""}),
    ]
    for key, algorithm, said in cases:
        public = {"kid": "x"} | key.as_dict(private=key is secret) | said
        other = key_of("P-256").as_dict(private=False) | {"kid": "other"}
        shop.issuer.reply = partial(key_set, public, other)
        shop.guard(shop.issuer.url)
        header = {"typ": "at+jwt", "kid": public["kid"]}
        signer = key.raw_value if key is secret else key.private_key
        forged = jwt.encode(claims, signer, algorithm, header)
        answer = shop("GET /", authorization=f"Bearer {forged}")
        assert answer.status in (401, 503), public


def forgeries(token: str, key: Any, url: str) -> Iterator[tuple[Any, str]]:
    """What can be made of a good token, the public key, and a server at the URL."""
    header, claims = opened(token)
    algorithm, claims["sub"] = header["alg"], "root"
    pem, public = key.as_pem(private=False), key.as_dict(private=False)
    x = base64.urlsafe_b64decode((public.get("x") or public["n"]) + "==")
    jwk = json.dumps(public | header | {"use": "sig"}).encode()
    der, ours = key.as_der(private=False), SECRET.encode()
    for known in (pem, pem.strip(), der, jwk, x, b"", ours):
        for name in ("HS256", algorithm):
            changed = header | {"alg": name}
            yield (name, known), signed(changed, claims, hs256(known))
    for name in ("none", "None", "", "HS512", "PS256", algorithm):
        for zeros in (b"", bytes(64)):
            changed = header | {"alg": name}
            yield (name, zeros), signed(changed, claims, lambda _: zeros)  # noqa: B023

    mine = key_of("Ed25519#forger")
    certificate = base64.b64encode(mine.as_der(private=False)).decode()
    wishes = {"jku": url, "x5u": url, "x5c": [certificate], "x5t#S256": "AAAA"}
    wishes |= {"jwk": mine.as_dict(private=False), "crit": ["jku"], "b64": True}
    for kid in (header["kid"], mine.thumbprint(), url, "../../../dev/null", "", None):
        for wish in ({}, {"cty": "JWT"}, *({name: wishes[name]} for name in wishes)):
            changed = {"alg": "EdDSA", "typ": "at+jwt", "kid": kid} | wish
            yield changed, signed(changed, claims, mine.private_key.sign)


@pytest.mark.parametrize("shop", KINDS, indirect=True)
def test_no_token_chooses_how_it_is_verified(shop, request):
    token = shop.login.user().access_token
    key = key_of(request.node.callspec.params["shop"])
    with Canned(lambda: b"") as trap:
        for how, forged in forgeries(token, key, trap.url):
            assert answer_to_bearer(shop.login, forged) == BAD_TOKEN, how
            assert answer_to_bearer(shop, forged) == BAD_TOKEN, how
        assert trap.agents == []
    assert answer_to_bearer(shop, token) == "200"


# ---- Hosts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issuing(tmp_path_factory):
    """A gunicorn that issues tokens for itself and for one other service."""
    key = files(tmp_path_factory.mktemp("keys"), "Ed25519")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    given = {"SERVICE_ISSUER": url, "SERVICE_AUDIENCE": f"{url},{SHOP}"}
    with serve(PORT=str(port), SERVICE_SIGNING_KEY_FILE=key, **given) as server:
        yield server


def example(command: str, **environ: Any) -> serve:
    """An example, run as its reader would run it."""
    python, folder = [sys.executable, *command.split()], ROOT / "examples"
    return serve(command=python, folder=folder, PYTHONPATH=str(ROOT), **environ)


@each("host", "flask django fastapi bare")
def test_every_kind_of_host_sees_who_logged_in(issuing, host):
    with example(f"{host}_guarded.py", ISSUER=issuing.url, AUDIENCE=SHOP) as shop:
        token = issuing.user(f"a-{host}")
        session = opened(token)[1]["sid"]
        assert shop("GET /", token).json == {"user": f"a-{host}", "session": session}
        assert shop("GET /health").json == {"status": "ok", "user": None}
        refused = shop("GET /")
        assert refused.status == 401
        assert refused.headers["WWW-Authenticate"] == 'Bearer realm="service"'


MOUNTS = {
    "flask": "flask_mount.py",
    "django": "django_mount.py",
    "fastapi": "-m gunicorn -k asgi -b 127.0.0.1:{port} fastapi_mount:app",
}


@each("host", MOUNTS)
def test_the_service_lives_under_a_prefix_of_every_kind_of_host(host):
    with example(MOUNTS[host], prefix="/api") as server:
        token = server.user("alice")
        for line, values, status, expected in TRANSCRIPT:
            answer = server(line, token, **values or {})
            found = answer.json if answer.body else None
            assert (line, answer.status, found) == (line, status, expected)
        created = server("POST /todos", token, body='{"task": "x"}', kind=JSON)
        assert created.headers["Location"] == "/api/todos/todo5"
        chunks = iter([b'{"task": ', b'"y"}'])
        chunked = server("PATCH /todos/todo5", token, body=chunks, kind=JSON)
        assert chunked.status in (200, 411, 0)  # 0: it was told while it still sent
        task = "y" if chunked.status == 200 else "x"
        assert server("GET /todos/todo5", token).json == {"task": task}
        challenge = server("GET /todos").headers["WWW-Authenticate"]
        assert challenge == 'Bearer realm="service"'
        server.prefix = ""
        assert "/api" in server("GET /").text


# ---- OAuth clients ------------------------------------------------------------------


def test_known_clients_refresh_by_themselves(monkeypatch):
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")  # it insists on https
    with serve(SERVICE_ACCESS_TTL="2") as server:
        server.user("alice")
        url, todos = f"{server.url}/token", f"{server.url}/todos"
        authlib = {"token_endpoint": url, "token_endpoint_auth_method": "none"}
        client = {"client": LegacyApplicationClient("shop"), "auto_refresh_url": url}
        requests = RequestsSession(token_updater=lambda token: None, **client)
        sessions = [AuthlibSession(leeway=0, **authlib), requests]
        for session in sessions:
            session.fetch_token(url, username="alice", password=PASSWORD)
        before = [dict(session.token) for session in sessions]

        def wait_until_expired():
            end = max(session.token["expires_at"] for session in sessions)
            eventually(lambda: time.time() > end)

        wait_until_expired()
        for session, old in zip(sessions, before, strict=True):
            assert server("GET /todos", old["access_token"]).status == 401
            assert session.post(todos, data={"task": "new"}).status_code == 201
            for name in ("access_token", "refresh_token"):
                assert session.token[name] != old[name]
        assert server("DELETE /users/me/sessions", server.user("alice")).status == 204
        wait_until_expired()
        for session in sessions:
            with pytest.raises((OAuthError, InvalidGrantError), match="invalid_grant"):
                session.get(todos)
            session.close()


# ---- An app of one's own, attacked ---------------------------------------------------


def test_no_item_nests_deeper_than_every_request_can_read():
    things = Resource("things", "thing", [Argument("list", type=list)])
    alice = World(resources=[things]).user("alice")
    for levels in (90, 101, 500, 960, 974, 30_000):
        body = b'{"list": ' + b"[" * levels + b"]" * levels + b"}"
        made = alice("POST /things", body, content_type=JSON)
        assert made.status == (201 if levels < 100 else 400), levels
    assert list(alice("GET /things").json) == ["thing1"]
    assert alice("PATCH /things/thing1", {"list": []}).json == {"list": []}


def test_a_session_that_has_ended_is_401_before_a_view_or_a_password_is_asked():
    hello = Route("GET /hello", lambda request: {"hello": request.user})
    world = World(routes=[hello])
    alice, other = world.user("alice"), world.log_in("alice")
    assert alice("GET /hello").json == {"hello": "alice"}
    assert other("DELETE /users/me/sessions").status == 204
    wrong = {"password": "a wrong password", "new_password": PASSWORD}
    for request in ("GET /hello", "DELETE /users/me", "PATCH /users/me"):
        assert [alice(request, wrong).status for _ in range(12)] == [401] * 12
    assert world.log_in("alice").is_in  # which no wrong password has slowed down


def test_a_login_by_form_is_read_like_every_other_form():
    world = World()
    form = {"username": "bob", "password": "\ufffd" * 15}
    assert world("POST /users", form=form).status == 201
    assert world("POST /token", form=form | {"grant_type": "password"}).status == 200
    hint = world("POST /token", b'{"grant_type": "password"}', content_type=FORM)
    assert "application/json" in hint.json["error_description"]
    for path in ("/token", "/revoke"):
        latin = world(f"POST {path}", form=form, environ={"QUERY_STRING": "\xff"})
        assert latin.status == 400


def test_a_path_with_a_nul_or_without_its_slash_and_every_origin_get_an_answer():
    shelf = Route("GET /shelf/", lambda request: "books", is_open=True)
    alice = World(routes=[shelf], cors_origins="https://app.example").user()
    assert alice("GET /todos/%00").status == 400
    assert (alice("GET /shelf/").status, alice("GET /shelf").status) == (200, 404)
    assert alice("GET /health", origin="*").headers["Vary"] == "Origin"


def test_what_a_host_declares_wrongly_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="rooms is shared"):
        Resource("rooms", "room", [], {"room1": {}}, shared="operator")
    for default in ({1}, float("nan")):
        with pytest.raises(ValueError, match="JSON"):
            Resource("rooms", "room", [Argument("beds", default=default)])
    with pytest.raises(ValueError, match="role"):
        Resource("rooms", "room", [], shared="Boss")
    monkeypatch.setattr(jwt.algorithms, "has_crypto", False)  # as if not installed
    with pytest.raises(ValueError, match="pip install cryptography"):
        signing(tmp_path, "Ed25519")


def test_an_item_has_the_names_of_its_arguments_and_null_takes_one_away():
    values = [
        Argument("n", dest="m", required=True),
        Argument("a", store_missing=False),
    ]
    alice = World(resources=[Resource("things", "thing", values)]).user()
    both = {"n": "1", "a": "2"}
    assert alice("PUT /things/x", both).json == both
    assert alice("PATCH /things/x", {"a": None}).json == {"n": "1"}


@each("kind", [FORM, MULTIPART])
@each("is_read", [False, True])
def test_the_parser_takes_flasks_request_even_when_somebody_has_read_it(kind, is_read):
    app, parser = flask.Flask("host"), RequestParser()
    parser.add_argument("file", location="files").add_argument("task")

    @app.post("/")
    def read():
        text = flask.request.form["task"] if is_read else None
        again = [parser.parse_args(flask.request)["task"] for _ in range(2)]
        return {"task": again, "text": text}

    sent = {"task": "Grüße"}
    found = app.test_client().post("/", data=sent, content_type=kind).json
    assert found == {"task": ["Grüße"] * 2, "text": "Grüße" if is_read else None}


def own(argument: Argument, **options: Any) -> World:
    """A service with a route of its own that gives back what it takes."""
    parser = RequestParser().add_argument(argument)

    def view(request):
        return parser.parse_args(request, **options)

    return World(routes=[Route("PUT /x", view, takes=parser, is_open=True)])


def test_a_route_of_ones_own_reads_what_it_takes_and_no_more():
    null = own(Argument("a", store_missing=False), partial=True)
    assert null("PUT /x", {"a": None}).json == {"a": None}
    picture = own(Argument("a", location="args"))
    assert picture("PUT /x?a=1", b"PNG", content_type="image/png").json == {"a": "1"}
    text, sent = own(Argument("a")), {"a": "x\ufffd"}
    assert text("PUT /x", form=sent, content_type=MULTIPART).json == sent
    hint = text("PUT /x", b'{"a": 1}', content_type=f"{MULTIPART}; boundary=b")
    assert "looks like JSON" in hint.text
    steps = own(Argument("a", int, choices=range(0, 9, 4)))("PUT /x", {"a": 3})
    assert "0, 4, 8" in steps.text
    many = own(Argument("a", int, choices=range(0, 10**9, 2)))("PUT /x", {"a": 3})
    assert "0, 2, ..., 999999998" in many.text


def test_a_view_may_redirect_in_any_script():
    view = Route("GET /x", lambda request: flask.redirect("/\u0437"), is_open=True)
    assert World(routes=[view])("GET /x").headers["Location"] == "/%D0%B7"
