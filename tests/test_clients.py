"""Programs of others: who verifies our keys, what we guard, who logs in, who hosts us.

Issuers are real servers on loopback. Forgeries are made with hmac and base64 alone: no
library mends what is to be broken.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jwt
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from joserfc import jwt as jose
from joserfc.jwk import KeySet
from oauthlib.oauth2 import LegacyApplicationClient
from oauthlib.oauth2.rfc6749.errors import InvalidGrantError
from requests_oauthlib import OAuth2Session as RequestsSession

import service
from conftest import ROOT, Canned, eventually, page, serve
from service import Argument, Resource, Route
from test_service import FORM, ISSUER, JSON, PASSWORD, SECRET, Answer, World, together

SHOP = "https://shop.example"  # another service, which a login opens too
ALGORITHMS = {"Ed25519": "EdDSA", "P-256": "ES256", "RSA": "RS256"}
KINDS = pytest.mark.parametrize("kind", ALGORITHMS)
JWKS = "GET /.well-known/jwks.json"


# ---- Keys ---------------------------------------------------------------------------


@cache
def made(name: str) -> Any:
    """The private key of this name: its kind, which #1, #2, … may follow."""
    kind = name.partition("#")[0]
    if kind == "RSA":
        return rsa.generate_private_key(65_537, 2048)
    if kind == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(
        {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1}[kind]()
    )


def private_pem(key: Any) -> bytes:
    form = (pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    return bytes(key.private_bytes(*form))


def public_bytes(key: Any, encoding: Any = pem.Encoding.PEM) -> bytes:
    form = pem.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(encoding, form))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(key: Any) -> dict[str, str]:
    """The required public members, from the key's numbers (RFC 7518 §6, 8037 §2)."""
    public = key.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        return {"crv": "Ed25519", "kty": "OKP", "x": b64(public.public_bytes_raw())}
    numbers = public.public_numbers()
    size = (public.key_size + 7) // 8
    if isinstance(public, ec.EllipticCurvePublicKey):
        x, y = (b64(each.to_bytes(size)) for each in (numbers.x, numbers.y))
        return {"crv": f"P-{public.key_size}", "kty": "EC", "x": x, "y": y}
    e, n = numbers.e.to_bytes(3), numbers.n.to_bytes(size)
    return {"e": b64(e), "kty": "RSA", "n": b64(n)}


def thumbprint(key: Any) -> str:
    """RFC 7638 §3: of the required members in their order, without white space."""
    text = json.dumps(jwk(key), sort_keys=True, separators=(",", ":"))
    return b64(hashlib.sha256(text.encode()).digest())


def parts_of(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the claims of a token, unchecked."""
    parts = [base64.urlsafe_b64decode(part + "==") for part in token.split(".")[:2]]
    return json.loads(parts[0]), json.loads(parts[1])


def signed(header: Any, claims: Any, sign: Callable[[bytes], bytes]) -> str:
    text = ".".join(b64(json.dumps(part).encode()) for part in (header, claims))
    return f"{text}.{b64(sign(text.encode()))}"


def hs256(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda text: hmac.digest(secret, text, "sha256")


def files(folder: Path, *names: str) -> str:
    """The value of SERVICE_SIGNING_KEY_FILE for the keys of these names."""
    for name in names:
        (folder / f"{name}.pem").write_bytes(private_pem(made(name)))
    return ",".join(f"{folder}/{name}.pem" for name in names)


def signing(folder: Path, *names: str, **options: Any) -> World:
    """A service that signs with the keys of these names, for itself and for a shop."""
    audience = f"{ISSUER},{SHOP}"
    return World(signing_key_file=files(folder, *names), audience=audience, **options)


# ---- Signing keys -------------------------------------------------------------------


@KINDS
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # which joserfc still reads
def test_a_key_signs_tokens_that_others_verify(tmp_path: Path, kind: str) -> None:
    world, key = signing(tmp_path, kind), made(kind)
    keys, token = world(JWKS), world.user().access_token
    members = {"kid": thumbprint(key), "use": "sig", "alg": ALGORITHMS[kind]}
    assert keys.json == {"keys": [jwk(key) | members]}
    assert keys.headers["Cache-Control"] == "max-age=300"
    header = {"alg": ALGORITHMS[kind], "typ": "at+jwt", "kid": thumbprint(key)}
    assert parts_of(token)[0] == header

    jose_keys = KeySet.import_key_set(keys.json)
    claims = jose.decode(token, jose_keys, [ALGORITHMS[kind]]).claims
    jwt_key = jwt.PyJWKSet.from_dict(keys.json)[thumbprint(key)]
    times: Any = {"verify_iat": False, "verify_exp": False}  # our clock is our own
    assert claims == jwt.decode(token, jwt_key, audience=SHOP, options=times)
    assert (claims["sub"], claims["aud"]) == ("alice", [ISSUER, SHOP])

    message, _, signature = token.rpartition(".")
    other = "A" if signature[20] != "A" else "B"
    damaged = f"{message}.{signature[:20]}{other}{signature[21:]}"
    assert world("GET /users/me", authorization=f"Bearer {token}").status == 200
    assert world("GET /users/me", authorization=f"Bearer {damaged}").status == 401


def test_several_keys_are_published_once_and_the_first_signs(tmp_path: Path) -> None:
    names = ("P-256", "RSA", "Ed25519", "P-256")
    world = signing(tmp_path, *names)
    found = [key["alg"] for key in world(JWKS).json["keys"]]
    assert found == ["ES256", "RS256", "EdDSA"]
    assert parts_of(world.user().access_token)[0]["alg"] == "ES256"


GENPKEY = {
    "Ed25519": "openssl genpkey -algorithm ed25519",
    "P-256": "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256",
    "RSA": "openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072",
    "RSA, old form": "openssl genrsa -traditional 2048",
}


def output(command: str) -> bytes:
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    return done.stdout


@pytest.mark.parametrize("how", GENPKEY)
def test_openssl_makes_the_keys(tmp_path: Path, how: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(b"A line of explanation\n" + output(GENPKEY[how]))
    assert World(signing_key_file=str(path)).user().is_in


@KINDS
def test_refresh_tokens_stay_with_the_secret(tmp_path: Path, kind: str) -> None:
    world = signing(tmp_path, kind)
    alice = world.user()
    header, claims = parts_of(alice.refresh_token)
    assert (header["alg"], header["typ"]) == ("HS256", "rt+jwt")
    text, _, signature = alice.refresh_token.rpartition(".")
    assert signature == b64(hs256(SECRET.encode())(text.encode()))

    key = made(kind)
    header |= {"alg": ALGORITHMS[kind], "kid": thumbprint(key)}
    forged = jwt.encode(claims, key, header["alg"], header)
    assert world.refresh(forged).json["error"] == "invalid_grant"
    assert parts_of(alice.refresh().access_token)[0]["alg"] == ALGORITHMS[kind]


def test_a_first_signing_key_ends_access_tokens_but_no_session(tmp_path: Path) -> None:
    before = World()
    old = before.user()
    after = signing(tmp_path, "Ed25519", store=before.store, clock=before.clock)
    bearer = f"Bearer {old.access_token}"
    refused = after("GET /todos", authorization=bearer)
    assert 'error="invalid_token"' in refused.headers["WWW-Authenticate"]
    pair = after.refresh(old.refresh_token).json
    bearer = f"Bearer {pair['access_token']}"
    assert after("GET /todos", authorization=bearer).status == 200
    assert before("GET /todos", authorization=bearer).status == 401  # and back again
    assert before.refresh(pair["refresh_token"]).status == 200


def test_keys_are_rotated_without_one_refused_request(tmp_path: Path) -> None:
    old, new = "Ed25519#1", "Ed25519#2"
    world = signing(tmp_path, old)
    pair, used = world.user().pair, []
    for names in ((old, new), (new, old), (new,)):  # behind, to the front, alone
        world = signing(tmp_path, *names, store=world.store, clock=world.clock)
        for _ in range(2):
            bearer = f"Bearer {pair['access_token']}"
            assert world("GET /todos", authorization=bearer).status == 200
            pair = world.refresh(pair["refresh_token"]).json
        used.append(parts_of(pair["access_token"])[0]["kid"])
    first, second = thumbprint(made(old)), thumbprint(made(new))
    assert used == [first, second, second]


FAULTS = {
    "RSA of 1024 bits": "openssl genrsa -traditional 1024",
    "RSA of 2047 bits": "openssl genrsa 2047",
    "P-384": "openssl ecparam -name secp384r1 -genkey -noout",
    "secp256k1": "openssl ecparam -name secp256k1 -genkey -noout",
    "Ed448": "openssl genpkey -algorithm ed448",
    "encrypted": "openssl genpkey -algorithm ed25519 -aes256 -pass pass:word",
    "encrypted, old form": "openssl genrsa -traditional -aes256 -passout pass:word",
    "public": "openssl genpkey -algorithm ed25519 | openssl pkey -pubout",
    "DER": "openssl genpkey -algorithm ed25519 -outform DER",
    "empty": "true",
    "garbage": "head -c 99 /dev/urandom",
    "cut off": "openssl genrsa 2048 | head -c 500",
    "hollow": "echo -----BEGIN PRIVATE KEY-----; echo -----END PRIVATE KEY-----",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_key_is_a_line_with_variable_and_file(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(output(FAULTS[fault]))
    for bad in (path, tmp_path / "missing.pem", tmp_path, tmp_path / ("x" * 300)):
        for value in (f"{bad}", f"{files(tmp_path, 'Ed25519')},{bad}"):
            line = rf"^SERVICE_SIGNING_KEY_FILE .*{re.escape(f'{bad}')}.*\Z"
            with pytest.raises(ValueError, match=line):
                World(signing_key_file=value)


# ---- The guard, with keys from afar -------------------------------------------------


class Shop:
    """A service that logs in, the server of its keys, and an app behind a guard."""

    def __init__(self, folder: Path, kind: str = "Ed25519") -> None:
        self.login = signing(folder, kind)
        self.issuer = Canned(lambda: page(self.login(JWKS).body))
        self.behind, self.later = World(), 0.0

    def __enter__(self) -> Shop:
        self.issuer.__enter__()
        self.guard()
        return self

    def __exit__(self, *error: object) -> None:
        self.issuer.__exit__()

    def guard(self, path: str = "/.well-known/jwks.json") -> None:
        """Put a new guard, which knows no keys, before the app."""
        self.behind.app = service.guard(
            self.app,
            issuer=ISSUER,
            audience=SHOP,
            jwks_url=self.issuer.url + path,
            open_paths=["/health"],
            clock=self.login.clock,
        )

    def wait(self, seconds: float) -> None:
        """By both clocks: PyJWT keeps keys by the machine's own."""
        self.later += seconds
        self.login.clock.step(seconds)

    def app(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """Says whom it sees."""
        start_response("200 OK", [("Content-Type", "application/json")])
        seen = [environ.get("REMOTE_USER"), environ.get("service.claims")]
        return [json.dumps(seen).encode()]

    def __call__(self, token: str | None = None, line: str = "GET /") -> Answer:
        bearer = {} if token is None else {"authorization": f"Bearer {token}"}
        return self.behind(line, **bearer)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    real = time.monotonic
    with Shop(tmp_path) as shop:
        monkeypatch.setattr(time, "monotonic", lambda: real() + shop.later)
        yield shop


def test_a_login_opens_the_shop_which_sees_the_user_and_the_claims(shop: Shop) -> None:
    token = shop.login.user("alice", roles=["operator"]).access_token
    user, claims = shop(token).json
    assert (user, claims) == ("alice", parts_of(token)[1])
    assert claims["roles"] == ["operator"]
    assert shop(line="GET /health").json == [None, None]
    assert shop().headers["WWW-Authenticate"] == 'Bearer realm="service"'
    assert shop(World(audience=SHOP).user().access_token).status == 401  # by a secret


def test_the_shop_closes_within_an_access_life_of_a_logout(shop: Shop) -> None:
    alice = shop.login.user()
    shop.login("POST /revoke", form={"token": alice.access_token})
    assert not alice.is_in
    shop.login.clock.step(899)
    assert shop(alice.access_token).status == 200  # it knows keys, and no sessions
    shop.login.clock.step(1)
    assert shop(alice.access_token).status == 401


def test_keys_are_fetched_when_needed_and_kept_for_300_seconds(shop: Shop) -> None:
    for each in (None, "junk", "a.b.c"):
        assert shop(each).status == 401
    assert shop.issuer.agents == []
    alice = shop.login.user()
    for seconds, fetches in ((0, 1), (1, 1), (290, 1), (10, 2), (10, 2)):
        shop.wait(seconds)
        alice = alice.refresh()
        assert shop(alice.access_token).status == 200
        assert len(shop.issuer.agents) == fetches
    assert "Python-urllib" not in "".join(shop.issuer.agents)


def test_one_set_is_fetched_for_twenty_who_come_at_once(shop: Shop) -> None:
    token = shop.login.user().access_token
    assert together(20, lambda n: shop(token).status) == [200] * 20
    assert len(shop.issuer.agents) == 1


def test_a_flood_of_unknown_kids_is_no_flood_of_fetches(shop: Shop) -> None:
    token = shop.login.user().access_token
    header, claims = parts_of(token)
    assert shop(token).status == 200
    for minute in (1, 2, 3):
        shop.wait(60)
        for each in range(50):
            unknown = header | {"kid": f"unknown {minute} {each}"}
            assert shop(signed(unknown, claims, hs256(b""))).status == 401
        assert len(shop.issuer.agents) == 1 + minute
    assert shop(token).status == 200


def test_a_rotated_key_is_found_an_old_one_forgotten(
    shop: Shop, tmp_path: Path
) -> None:
    login = shop.login
    old = login.user().access_token
    assert shop(old).status == 200
    shop.login = signing(tmp_path, "P-256", store=login.store, clock=login.clock)
    shop.wait(60)
    assert shop(shop.login.log_in().access_token).status == 200
    shop.wait(301)
    assert shop(old).status == 401


def test_an_unreachable_issuer_is_503_until_it_is_back(shop: Shop) -> None:
    token = shop.login.user().access_token
    shop.issuer.__exit__()
    away = shop(token)
    assert (away.status, [*away.json]) == (503, ["message"])
    assert "WWW-Authenticate" not in away.headers
    assert (shop().status, shop(line="GET /health").status) == (401, 200)
    shop.issuer.__enter__()
    shop.wait(int(away.headers["Retry-After"]))
    assert shop(token).json[0] == "alice"


def test_an_issuer_that_is_away_for_less_is_not_missed(shop: Shop) -> None:
    alice = shop.login.user()
    assert shop(alice.access_token).status == 200
    shop.issuer.reply = lambda: page(b"", "502 Bad Gateway")
    shop.wait(290)
    assert shop(alice.refresh().access_token).status == 200


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
    "key with half a point": key_set(
        {"kty": "EC", "crv": "P-256", "kid": "x", "x": "A"}
    ),
    "key with alg none": key_set({"kty": "OKP", "kid": "x", "alg": "none"}),
}


@pytest.mark.parametrize("junk", JUNK)
def test_a_key_set_that_is_none_is_503(shop: Shop, junk: str) -> None:
    shop.issuer.reply = lambda: JUNK[junk]
    answer = shop(shop.login.user().access_token)
    assert (answer.status, "Retry-After" in answer.headers) == (503, True)


@contextmanager
def trap() -> Iterator[str]:
    """The URL of a server that nobody may ask."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/jwks.json"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_keys_come_over_http_from_the_very_url_that_was_given(shop: Shop) -> None:
    with trap() as url:
        shop.issuer.reply = lambda: page(b"", "302 Found", f"Location: {url}")
        assert shop(shop.login.user().access_token).status == 503
    shop.issuer.url = "file:///etc"
    with pytest.raises((ValueError, jwt.PyJWTError)):
        shop.guard("/passwd")


def resigned(key: Any, algorithm: str, token: str, kid: str) -> str:
    header = {"typ": "at+jwt", "kid": kid}
    return jwt.encode(parts_of(token)[1], key, algorithm, header)


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
def test_symmetric_weak_and_unfit_keys_of_a_key_set_verify_nothing(shop: Shop) -> None:
    good, curve, secret = made("Ed25519"), made("P-384"), b"s" * 32
    weak = pem.load_pem_private_key(output(FAULTS["RSA of 1024 bits"]), None)
    token = shop.login.user().access_token
    oct_key = {"kty": "oct", "k": b64(secret)}
    cases: list[tuple[dict[str, str], Any, str]] = [
        (oct_key, secret, "HS256"),
        (oct_key | {"alg": "HS256"}, secret, "HS256"),
        (oct_key | {"alg": "EdDSA"}, secret, "HS256"),
        (jwk(weak), weak, "RS256"),
        (jwk(curve), curve, "ES384"),
        (jwk(curve) | {"alg": "ES256"}, curve, "ES384"),
        (jwk(good) | {"use": "enc"}, good, "EdDSA"),
        (jwk(good) | {"kid": ""}, good, "EdDSA"),
    ]
    for key, signer, algorithm in cases:
        keys = {"kid": "x"} | key, jwk(made("P-256")) | {"kid": "other"}
        shop.issuer.reply = lambda keys=keys: key_set(*keys)  # type: ignore[misc]
        shop.guard()
        forged = resigned(signer, algorithm, token, key.get("kid", "x"))
        assert shop(forged).status in (401, 503), key


def forgeries(token: str, key: Any, url: str) -> Iterator[tuple[str, str]]:
    """What can be made of a good token, the public key, and a server at the URL."""
    header, claims = parts_of(token)
    claims |= {"sub": "root"}
    public = jwk(key) | {"kid": header["kid"], "use": "sig", "alg": header["alg"]}
    x = public.get("x") or public["n"]
    known = {
        "PEM": public_bytes(key),
        "PEM without its last line break": public_bytes(key).strip(),
        "DER": public_bytes(key, pem.Encoding.DER),
        "JWK": json.dumps(public).encode(),
        "x or n": base64.urlsafe_b64decode(x + "=="),
        "nothing": b"",
        "our secret": SECRET.encode(),
    }
    for name, secret in known.items():
        for algorithm in ("HS256", header["alg"]):
            changed = header | {"alg": algorithm}
            yield f"{algorithm} with {name}", signed(changed, claims, hs256(secret))
    for algorithm in ("none", "None", "", "HS512", "PS256", header["alg"]):
        for size in (0, 64):
            changed = header | {"alg": algorithm}
            forged = signed(changed, claims, lambda text, size=size: bytes(size))  # type: ignore[misc]
            yield f"{algorithm} with {size} zeros", forged

    mine = made("Ed25519#forger")
    certificate = base64.b64encode(public_bytes(mine, pem.Encoding.DER)).decode()
    wishes = {"jwk": jwk(mine), "jku": url, "x5u": url, "x5c": [certificate]}
    wishes |= {"x5t#S256": "AAAA", "crit": ["jku"], "cty": "JWT", "b64": True}
    for kid in (header["kid"], thumbprint(mine), url, "../../../dev/null", "", None):
        base = {"alg": "EdDSA", "typ": "at+jwt", "kid": kid}
        yield f"kid {kid}", signed(base, claims, mine.sign)
        for name, wish in wishes.items():
            yield f"{name}, kid {kid}", signed(base | {name: wish}, claims, mine.sign)


@KINDS
def test_no_token_chooses_how_it_is_verified(tmp_path: Path, kind: str) -> None:
    with Shop(tmp_path, kind) as shop, trap() as url:
        token = shop.login.user().access_token
        for name, forged in forgeries(token, made(kind), url):
            bearer = f"Bearer {forged}"
            assert shop.login("GET /users/me", authorization=bearer).status == 401, name
            assert shop(forged).status == 401, name
        assert shop(token).status == 200


# ---- Hosts --------------------------------------------------------------------------

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def issuing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serve]:
    """A gunicorn that issues tokens for itself and for one other service."""
    key = files(tmp_path_factory.mktemp("keys"), "Ed25519")
    issuer = "http://127.0.0.1:{port}"
    with serve(
        SERVICE_SIGNING_KEY_FILE=key,
        SERVICE_ISSUER=issuer,
        SERVICE_AUDIENCE=f"{issuer},{SHOP}",
    ) as server:
        yield server


def example(*command: str, **environ: str) -> serve:
    """An example, run as its reader would run it."""
    python = [sys.executable, *command]
    environ |= {"PYTHONPATH": str(ROOT)}
    ready = "/api/health" if "mount" in "".join(command) else "/health"
    return serve(command=python, folder=EXAMPLES, ready=ready, **environ)


@pytest.mark.parametrize("host", ["flask", "django", "fastapi", "bare"])
def test_every_kind_of_host_sees_who_logged_in(issuing: serve, host: str) -> None:
    environ = {"ISSUER": issuing.url, "AUDIENCE": SHOP}
    with example(f"{host}_guarded.py", **environ) as shop:
        token = issuing.user(f"a-{host}")
        session = parts_of(token)[1]["sid"]
        assert shop("GET /", token).json == {"user": f"a-{host}", "session": session}
        assert shop("GET /health").json == {"status": "ok", "user": None}
        refused = shop("GET /")
        assert refused.status == 401
        assert refused.headers["WWW-Authenticate"] == 'Bearer realm="service"'


MOUNTS = {
    "flask": ["flask_mount.py"],
    "django": ["django_mount.py"],
    "fastapi": [
        "-m",
        "gunicorn",
        "-k",
        "asgi",
        "-b",
        "127.0.0.1:{port}",
        "fastapi_mount:app",
    ],
}


@pytest.mark.parametrize("host", MOUNTS)
def test_the_service_lives_under_a_prefix_of_every_kind_of_host(host: str) -> None:
    with example(*MOUNTS[host]) as server:
        assert "/api" in server("GET /").text
        account = {"username": "alice", "password": PASSWORD}
        assert server("POST /api/users", **account).status == 201
        pair = server("POST /api/token", grant_type="password", **account).json
        token = pair["access_token"]
        created = server("POST /api/todos", token, task="something new")
        assert created.headers["Location"] == "/api/todos/todo4"
        changed = server("PATCH /api/todos/todo4", token, json={"task": "else"})
        assert (changed.status, changed.json) == (200, {"task": "else"})
        assert server("GET /api/todos/todo4", token).json == {"task": "else"}
        kind, body = {"Content-Type": "application/json"}, iter([b'{"task": "x"}'])
        chunked = server("PATCH /api/todos/todo4", token, body=body, headers=kind)
        whole = {"task": "x" if chunked.status == 200 else "else"}
        assert chunked.status in (200, 411, 0)  # 0: it was told while it still sent
        assert server("GET /api/todos/todo4", token).json == whole
        assert server("DELETE /api/todos/todo4", token).status == 204
        challenge = server("GET /api/todos").headers["WWW-Authenticate"]
        assert challenge == 'Bearer realm="service"'


# ---- OAuth clients ------------------------------------------------------------------


def authlib_session(url: str) -> Any:
    session = AuthlibSession(
        token_endpoint=f"{url}/token", token_endpoint_auth_method="none", leeway=0
    )
    session.fetch_token(username="alice", password=PASSWORD)
    return session


def requests_session(url: str) -> Any:
    session = RequestsSession(
        client=LegacyApplicationClient(client_id="shop"),
        auto_refresh_url=f"{url}/token",
        token_updater=lambda token: None,
    )
    session.fetch_token(f"{url}/token", username="alice", password=PASSWORD)
    return session


def test_known_clients_refresh_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")  # it insists on https
    with serve(SERVICE_ACCESS_TTL="2") as server:
        server("POST /users", username="alice", password=PASSWORD)
        sessions = [authlib_session(server.url), requests_session(server.url)]
        before = [dict(session.token) for session in sessions]

        def wait_until_expired() -> None:
            end = max(session.token["expires_at"] for session in sessions)
            eventually(lambda: time.time() > end)

        wait_until_expired()
        for session, old in zip(sessions, before, strict=True):
            assert server("GET /todos", old["access_token"]).status == 401
            created = session.post(f"{server.url}/todos", data={"task": "new"})
            assert created.status_code == 201
            for name in ("access_token", "refresh_token"):
                assert session.token[name] != old[name]

        assert server("DELETE /users/me/sessions", server.user("alice")).status == 204
        wait_until_expired()
        for session in sessions:
            with pytest.raises((OAuthError, InvalidGrantError), match="invalid_grant"):
                session.get(f"{server.url}/todos")
            session.close()


# ---- An app of one's own, attacked ---------------------------------------------------

THINGS = Resource("things", "thing", [Argument("list", type=list)])
HELLO = Route("GET /hello", lambda request: {"hello": request.user})


def test_no_item_nests_deeper_than_every_request_can_read() -> None:
    alice = World(resources=[THINGS]).user("alice")
    for levels in (90, 101, 500, 960, 974, 30_000):
        body = b'{"list": ' + b"[" * levels + b"]" * levels + b"}"
        made = alice("POST /things", body, content_type=JSON)
        assert made.status == (201 if levels < 100 else 400), levels
    assert list(alice("GET /things").json) == ["thing1"]
    assert alice("PATCH /things/thing1", {"list": []}).json == {"list": []}


def test_a_session_that_has_ended_is_401_before_a_view_or_a_password_is_asked() -> None:
    world = World(routes=[HELLO])
    alice, other = world.user("alice"), world.log_in("alice")
    assert alice("GET /hello").json == {"hello": "alice"}
    assert other("DELETE /users/me/sessions").status == 204
    wrong = {"password": "a wrong password", "new_password": PASSWORD}
    for request in ("GET /hello", "DELETE /users/me", "PATCH /users/me"):
        assert [alice(request, wrong).status for _ in range(12)] == [401] * 12
    assert world.log_in("alice").is_in  # which no wrong password has slowed down


def test_a_login_by_form_is_read_like_every_other_form() -> None:
    world = World()
    form = {"username": "bob", "password": "\ufffd" * 15}
    assert world("POST /users", form=form).status == 201
    assert world("POST /token", form=form | {"grant_type": "password"}).status == 200
    hint = world("POST /token", b'{"grant_type": "password"}', content_type=FORM)
    assert "application/json" in hint.json["error_description"]
    for path in ("/token", "/revoke"):
        assert (
            world(f"POST {path}", form=form, environ={"QUERY_STRING": "\xff"}).status
            == 400
        )


def test_every_page_varies_with_its_origin_even_if_that_is_a_star() -> None:
    world = World(cors_origins="https://app.example")
    assert world("GET /health", origin="*").headers["Vary"] == "Origin"
