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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from conftest import ROOT, eventually, serve
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from joserfc import jwt as jose
from joserfc.jwk import KeySet
from oauthlib.oauth2 import LegacyApplicationClient
from oauthlib.oauth2.rfc6749.errors import InvalidGrantError
from requests_oauthlib import OAuth2Session as RequestsSession

import service
from test_service import ISSUER, PASSWORD, SECRET, Answer, Clock, World, together

SHOP = "https://shop.example"  # another service, which a login opens too
ALGORITHMS = {"Ed25519": "EdDSA", "P-256": "ES256", "RSA": "RS256"}
KINDS = pytest.mark.parametrize("kind", ALGORITHMS)
JWKS = "GET /.well-known/jwks.json"


# ---- Keys ---------------------------------------------------------------------------


@cache
def made(name: str) -> Any:
    """The private key of this name: its kind, which #1, #2, … may follow."""
    kind = name.partition("#")[0]
    if kind.startswith("RSA"):
        return rsa.generate_private_key(65_537, int(kind[4:] or 2048))
    if kind == "DSA":
        return dsa.generate_private_key(1024)
    curves = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "secp256k1": ec.SECP256K1}
    if kind in curves:
        return ec.generate_private_key(curves[kind]())
    edwards: dict[str, Any] = {
        "Ed25519": ed25519.Ed25519PrivateKey,
        "Ed448": ed448.Ed448PrivateKey,
    }
    return edwards[kind].generate()


def private_pem(
    key: Any, password: bytes | None = None, form: Any = pem.PrivateFormat.PKCS8
) -> bytes:
    lock = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    return bytes(key.private_bytes(pem.Encoding.PEM, form, lock))


def public_bytes(key: Any, encoding: Any = pem.Encoding.PEM) -> bytes:
    form = pem.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(encoding, form))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def jwk(key: Any) -> dict[str, str]:
    """The required public members, from the key's numbers (RFC 7518 §6, 8037 §2)."""
    public = key.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        return {"crv": "Ed25519", "kty": "OKP", "x": b64(public.public_bytes_raw())}
    numbers = public.public_numbers()
    if isinstance(public, ec.EllipticCurvePublicKey):
        size = (public.key_size + 7) // 8
        x, y = (b64(each.to_bytes(size, "big")) for each in (numbers.x, numbers.y))
        return {"crv": f"P-{public.key_size}", "kty": "EC", "x": x, "y": y}
    return {"e": number(numbers.e), "kty": "RSA", "n": number(numbers.n)}


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
def test_a_key_signs_access_tokens_with_the_algorithm_of_its_kind(
    tmp_path: Path, kind: str
) -> None:
    world = signing(tmp_path, kind)
    alice, key = world.user(), made(kind)
    header = {"alg": ALGORITHMS[kind], "typ": "at+jwt", "kid": thumbprint(key)}
    assert parts_of(alice.access_token)[0] == header
    assert alice("GET /users/me").json["username"] == "alice"
    message, _, signature = alice.access_token.rpartition(".")
    other = "A" if signature[20] != "A" else "B"
    damaged = f"{message}.{signature[:20]}{other}{signature[21:]}"
    assert world("GET /users/me", authorization=f"Bearer {damaged}").status == 401


@KINDS
def test_the_key_set_has_public_members_only_and_may_be_kept_for_five_minutes(
    tmp_path: Path, kind: str
) -> None:
    answer = signing(tmp_path, kind)(JWKS)
    key, more = made(kind), {"use": "sig", "alg": ALGORITHMS[kind]}
    assert answer.json == {"keys": [jwk(key) | {"kid": thumbprint(key)} | more]}
    assert answer.headers["Cache-Control"] == "max-age=300"
    assert answer.headers["Content-Type"] == "application/json"


@KINDS
def test_libraries_that_others_wrote_verify_a_token_with_the_key_set_alone(
    tmp_path: Path, kind: str
) -> None:
    world = signing(tmp_path, kind)
    token, keys = world.user().access_token, world(JWKS).json
    claims = jose.decode(token, KeySet.import_key_set(keys), [ALGORITHMS[kind]]).claims
    key = jwt.PyJWKSet.from_dict(keys)[parts_of(token)[0]["kid"]]
    options: Any = {"verify_iat": False, "verify_exp": False}  # our clock is our own
    assert claims == jwt.decode(
        token, key, audience=SHOP, issuer=ISSUER, options=options
    )
    assert (claims["sub"], claims["aud"]) == ("alice", [ISSUER, SHOP])


def test_the_key_of_rfc_8037_has_the_thumbprint_that_is_printed_there(
    tmp_path: Path,
) -> None:
    d = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(d)
    (tmp_path / "rfc.pem").write_bytes(private_pem(key))
    (found,) = World(signing_key_file=f"{tmp_path}/rfc.pem")(JWKS).json["keys"]
    assert found["kid"] == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert found["x"] == "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"


def test_several_keys_are_all_published_once_and_the_first_signs(
    tmp_path: Path,
) -> None:
    names = ("P-256", "RSA", "Ed25519", "P-256")
    world = signing(tmp_path, *names)
    found = [key["alg"] for key in world(JWKS).json["keys"]]
    assert found == ["ES256", "RS256", "EdDSA"]
    assert parts_of(world.user().access_token)[0]["alg"] == "ES256"


GENPKEY = {
    "Ed25519": "openssl genpkey -algorithm ed25519",
    "P-256": "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256",
    "P-256, old form": "openssl ecparam -name prime256v1 -genkey",
    "RSA": "openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072",
    "RSA, old form": "openssl genrsa -traditional 2048",
}


def output(command: str) -> bytes:
    return subprocess.run(command.split(), capture_output=True, check=True).stdout


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


def test_a_first_signing_key_ends_hs256_access_tokens_but_no_session(
    tmp_path: Path,
) -> None:
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


OLD_FORM = pem.PrivateFormat.TraditionalOpenSSL
FAULTS: dict[str, Callable[[], bytes]] = {
    "RSA of 1024 bits": lambda: output("openssl genrsa -traditional 1024"),
    "RSA of 2047 bits": lambda: private_pem(made("RSA-2047")),
    "P-384": lambda: private_pem(made("P-384")),
    "secp256k1": lambda: private_pem(made("secp256k1")),
    "Ed448": lambda: private_pem(made("Ed448")),
    "DSA": lambda: private_pem(made("DSA")),
    "encrypted": lambda: private_pem(made("Ed25519"), b"a password"),
    "encrypted, old form": lambda: private_pem(made("RSA"), b"a password", OLD_FORM),
    "public": lambda: public_bytes(made("Ed25519")),
    "DER": lambda: base64.b64decode(
        b"".join(private_pem(made("RSA")).split(b"\n")[1:-2])
    ),
    "OpenSSH": lambda: private_pem(made("Ed25519"), form=pem.PrivateFormat.OpenSSH),
    "empty": lambda: b"",
    "garbage": lambda: b"\xff\x00 garbage",
    "cut off": lambda: private_pem(made("RSA"))[:500],
    "hollow": lambda: b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_key_that_cannot_do_is_a_line_that_names_variable_and_file(
    tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(FAULTS[fault]())
    for value in (str(path), f"{files(tmp_path, 'Ed25519')},{path}"):
        with pytest.raises(
            ValueError, match=r"^SERVICE_SIGNING_KEY_FILE .*\Z"
        ) as error:
            World(signing_key_file=value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["missing.pem", ".", "missing/key.pem", "x" * 300])
def test_a_key_file_that_cannot_be_read_is_one_line_too(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=r"^SERVICE_SIGNING_KEY_FILE .*\Z"):
        World(signing_key_file=str(tmp_path / name))


# ---- The guard, with keys from afar -------------------------------------------------


class Issuer:
    """A real HTTP server that publishes a key set, and notes who asks for it."""

    def __init__(self, answer: Callable[[], bytes]) -> None:
        self.answer, self.agents = answer, list[str]()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.agents.append(self.headers["User-Agent"])
                self.wfile.write(issuer.answer())

            def log_message(self, *ignored: object) -> None:
                pass

        self.handler, self.port = Handler, 0
        self.start()

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/.well-known/jwks.json"


def reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def key_set(*keys: Any) -> bytes:
    return reply(json.dumps({"keys": keys}).encode())


@pytest.fixture
def login(tmp_path: Path) -> World:
    """A service with a signing key, whose tokens are for the shop as well."""
    return signing(tmp_path, "Ed25519")


@pytest.fixture
def issuer(login: World) -> Iterator[Issuer]:
    """That service's key set on a server of its own."""
    running = Issuer(lambda: reply(login(JWKS).body))
    yield running
    running.stop()


def who(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """An app that says whom it sees."""
    start_response("200 OK", [("Content-Type", "application/json")])
    claims = environ.get("service.claims")
    return [json.dumps([environ.get("REMOTE_USER"), claims]).encode()]


class Shop:
    """An app behind a guard that knows the issuer by the URL of its keys."""

    def __init__(self, url: str, clock: Clock, **options: Any) -> None:
        given = {"issuer": ISSUER, "audience": SHOP, "clock": clock} | options
        self.world = World()
        self.world.app = service.guard(who, jwks_url=url, **given)

    def __call__(self, token: str | None = None, line: str = "GET /") -> Answer:
        bearer = {} if token is None else {"authorization": f"Bearer {token}"}
        return self.world(line, **bearer)


@pytest.fixture
def shop(login: World, issuer: Issuer) -> Shop:
    return Shop(issuer.url, login.clock, open_paths=["/health"])


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass for PyJWT, which keeps keys by the machine's own clock."""
    shift, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + shift[0])

    def wait(seconds: float) -> None:
        shift[0] += seconds

    return wait


def test_a_login_opens_the_shop_which_sees_the_user_and_the_claims(
    login: World, shop: Shop
) -> None:
    token = login.user("alice", roles=["operator"]).access_token
    user, claims = shop(token).json
    assert (user, claims) == ("alice", parts_of(token)[1])
    assert claims["roles"] == ["operator"]
    assert shop(line="GET /health").json == [None, None]
    assert shop().headers["WWW-Authenticate"] == 'Bearer realm="service"'


def test_the_shop_closes_when_the_access_token_expires_after_a_logout(
    login: World, shop: Shop
) -> None:
    alice = login.user()
    login("POST /revoke", form={"token": alice.access_token})
    assert not alice.is_in
    login.clock.step(899)
    assert shop(alice.access_token).status == 200  # it knows keys, and no sessions
    login.clock.step(1)
    assert shop(alice.access_token).status == 401


def test_keys_are_fetched_when_they_are_needed_and_kept_for_300_seconds(
    login: World, issuer: Issuer, shop: Shop, later: Callable[[float], None]
) -> None:
    token = login.user().access_token
    for each in (None, "junk", "a.b.c"):
        assert shop(each).status == 401
    assert issuer.agents == []
    for seconds, fetches in ((0, 1), (1, 1), (290, 1), (10, 2), (10, 2)):
        later(seconds)
        assert shop(token).status == 200
        assert len(issuer.agents) == fetches
    assert "Python-urllib" not in "".join(issuer.agents)


def test_one_set_is_fetched_for_twenty_who_come_at_once(
    login: World, issuer: Issuer, shop: Shop
) -> None:
    alice = login.user()
    tokens = [login.log_in().access_token for _ in range(19)] + [alice.access_token]
    assert together(20, lambda n: shop(tokens[n]).status) == [200] * 20
    assert len(issuer.agents) == 1


def test_a_flood_of_unknown_kids_is_no_flood_of_fetches(
    login: World, issuer: Issuer, shop: Shop, later: Callable[[float], None]
) -> None:
    token = login.user().access_token
    header, claims = parts_of(token)
    assert shop(token).status == 200
    for minute in range(3):
        later(60)
        for each in range(50):
            unknown = header | {"kid": f"unknown {minute} {each}"}
            assert shop(signed(unknown, claims, hs256(b""))).status == 401
        assert len(issuer.agents) == 2 + minute
    assert shop(token).status == 200


def test_a_rotated_key_is_found_within_a_minute_and_a_withdrawn_one_forgotten(
    login: World,
    issuer: Issuer,
    shop: Shop,
    later: Callable[[float], None],
    tmp_path: Path,
) -> None:
    old = login.user().access_token
    assert shop(old).status == 200
    rotated = signing(tmp_path, "P-256", store=login.store, clock=login.clock)
    issuer.answer = lambda: reply(rotated(JWKS).body)
    later(60)
    assert shop(rotated.log_in().access_token).status == 200
    later(300)
    assert shop(old).status == 401


def test_an_unreachable_issuer_is_503_until_it_is_back(
    login: World, issuer: Issuer, shop: Shop, later: Callable[[float], None]
) -> None:
    token = login.user().access_token
    issuer.stop()
    away = shop(token)
    assert (away.status, [*away.json]) == (503, ["message"])
    assert "WWW-Authenticate" not in away.headers
    assert (shop().status, shop(line="GET /health").status) == (401, 200)
    issuer.start()
    later(int(away.headers["Retry-After"]))
    assert shop(token).json[0] == "alice"


def test_an_issuer_that_is_away_for_less_than_300_seconds_is_not_missed(
    login: World, issuer: Issuer, shop: Shop, later: Callable[[float], None]
) -> None:
    alice = login.user()
    assert shop(alice.access_token).status == 200
    issuer.answer = lambda: reply(b"", "502 Bad Gateway")
    later(290)
    assert shop(alice.refresh().access_token).status == 200


JUNK = {
    "no HTTP": b"hello\r\n\r\n",
    "nothing": b"",
    "cut off": b'HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\n{"keys": [',
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "not found": reply(b'{"keys": []}', "404 Not Found"),
    "login page": reply(b"<html>", "401 Unauthorized", "WWW-Authenticate: Negotiate"),
    "no content": b"HTTP/1.0 204 No Content\r\n\r\n",
    "html": reply(b"<!doctype html>"),
    "not UTF-8": reply(b"\xff\xfe{}"),
    "nested": reply(b"[" * 200_000),
    "a list": reply(b"[]"),
    "null": reply(b"null"),
    "no keys": reply(b"{}"),
    "empty": reply(b'{"keys": []}'),
    "keys null": reply(b'{"keys": null}'),
    "keys a number": reply(b'{"keys": 5}'),
    "keys of text": key_set("x", 5, None, []),
    "key without kty": key_set({"kid": "x", "x": "AA"}),
    "key with a list for kty": key_set({"kty": [], "kid": "x"}),
    "key with half a point": key_set(
        {"kty": "EC", "crv": "P-256", "kid": "x", "x": "A"}
    ),
    "key with alg none": key_set({"kty": "OKP", "kid": "x", "alg": "none"}),
}


@pytest.mark.parametrize("junk", JUNK)
def test_a_key_set_that_is_none_is_503(
    login: World, issuer: Issuer, shop: Shop, junk: str
) -> None:
    issuer.answer = lambda: JUNK[junk]
    answer = shop(login.user().access_token)
    assert (answer.status, "Retry-After" in answer.headers) == (503, True)


@contextmanager
def trap() -> Iterator[str]:
    """The URL of a server that nobody may ask."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/jwks.json"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_redirect_is_not_followed(login: World, issuer: Issuer, shop: Shop) -> None:
    with trap() as url:
        issuer.answer = lambda: reply(b"", "302 Found", f"Location: {url}")
        assert shop(login.user().access_token).status == 503


def test_keys_are_fetched_over_http_only(login: World, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b'{"keys": []}')
    with pytest.raises((ValueError, jwt.PyJWTError)):
        Shop(f"file://{tmp_path}/keys", login.clock)


def resigned(key: Any, algorithm: str, token: str, kid: str) -> str:
    header = {"typ": "at+jwt", "kid": kid}
    return jwt.encode(parts_of(token)[1], key, algorithm, header)


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
def test_symmetric_weak_and_unfit_keys_of_a_key_set_verify_nothing(
    login: World, issuer: Issuer
) -> None:
    good, weak = (
        made("Ed25519"),
        pem.load_pem_private_key(FAULTS["RSA of 1024 bits"](), None),
    )
    secret, curve, token = b"s" * 32, made("P-384"), login.user().access_token
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
        unfit, other = {"kid": "x"} | key, jwk(made("P-256")) | {"kid": "other"}
        issuer.answer = lambda keys=(unfit, other): key_set(*keys)  # type: ignore[misc]
        forged = resigned(signer, algorithm, token, key.get("kid", "x"))
        assert Shop(issuer.url, login.clock)(forged).status in (401, 503), key


def test_a_secret_opens_nothing_that_wants_public_keys(shop: Shop) -> None:
    assert shop(World(audience=SHOP).user().access_token).status == 401


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
        "compact JWK": json.dumps(public, separators=(",", ":")).encode(),
        "x or n": x.encode(),
        "bytes of x or n": base64.urlsafe_b64decode(x + "=="),
        "kid": header["kid"].encode(),
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
    wishes: dict[str, Any] = {
        "jwk": jwk(mine),
        "jku": url,
        "x5u": url,
        "x5c": [certificate],
        "x5t#S256": "AAAA",
        "crit": ["jku"],
        "cty": "JWT",
        "b64": True,
    }
    for kid in (header["kid"], thumbprint(mine), url, "../../../dev/null", "", None):
        base = {"alg": "EdDSA", "typ": "at+jwt", "kid": kid}
        yield f"kid {kid}", signed(base, claims, mine.sign)
        for name, wish in wishes.items():
            yield f"{name}, kid {kid}", signed(base | {name: wish}, claims, mine.sign)


@KINDS
def test_no_token_chooses_how_it_is_verified_or_sends_anybody_anywhere(
    tmp_path: Path, kind: str
) -> None:
    world = signing(tmp_path, kind)
    token, issuer = world.user().access_token, Issuer(lambda: reply(world(JWKS).body))
    shop = Shop(issuer.url, world.clock)
    try:
        with trap() as url:
            for name, forged in forgeries(token, made(kind), url):
                bearer = f"Bearer {forged}"
                assert world("GET /users/me", authorization=bearer).status == 401, name
                assert shop(forged).status == 401, name
        assert shop(token).status == 200
    finally:
        issuer.stop()


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
def test_every_kind_of_host_sees_who_logged_in_elsewhere(
    issuing: serve, host: str
) -> None:
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
        chunked = server("PATCH /api/todos/todo4", token, body=iter([b'{"task": "x"}']),
                         headers={"Content-Type": "application/json"})  # fmt: skip
        whole = {"task": "x" if chunked.status == 200 else "else"}
        assert chunked.status in (200, 411)
        assert server("GET /api/todos/todo4", token).json == whole
        assert server("DELETE /api/todos/todo4", token).status == 204
        challenge = server("GET /api/todos").headers["WWW-Authenticate"]
        assert challenge == 'Bearer realm="service"'


@pytest.mark.parametrize(
    "path",
    sorted(EXAMPLES.glob("*_guarded.py")) + sorted(EXAMPLES.glob("*_mount.py")),
    ids=lambda path: path.stem,
)
def test_every_example_is_short_and_says_how_it_is_run(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 60
    assert re.search(rf"python examples/{path.name}|gunicorn .*{path.stem}:app", source)


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


def test_known_clients_refresh_by_themselves_and_see_the_end_of_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
