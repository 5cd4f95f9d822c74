"""The same little service, written with what others use; each file is one peer.

A peer is what a user of its framework would write after reading its documentation:
lists in dicts, tokens signed with HS256, and on every request the checks that
service.py makes too, namely the signature, the issuer, the audience, the expiry, and
whether the token was revoked. Every peer has `create_app()` and answers, in JSON:

    POST /token        {"grant_type": "password", "username": …, "password": …}
                       or {"grant_type": "refresh_token", "refresh_token": …}:
                       an access and a refresh token
    POST /revoke       the token as bearer and as {"token": …}
    GET, POST /todos   the items by id; {"task": …}, 201 with Location
    GET, PUT /todos/id the item, or 404 {"message": "Todo <id> doesn't exist"}; 201
"""

from datetime import timedelta

from werkzeug.security import check_password_hash, generate_password_hash

SECRET = "0123456789abcdef" * 4
ISSUER = "http://localhost:5000"
ACCESS_LIFE, REFRESH_LIFE = timedelta(minutes=15), timedelta(hours=24)
NAMES = ("alice", "bob", "carol", "dave")
PASSWORD = "correct horse battery staple"
LONGEST_TASK = 10_000

_hash = generate_password_hash(PASSWORD)  # scrypt, as service.py has it
HASHES = dict.fromkeys(NAMES, _hash)

Todos = dict[str, dict[str, dict[str, str]]]


def new_todos() -> Todos:
    """{user: {id: item}}, as everybody's list begins."""
    tasks = {"todo1": "build an API", "todo2": "?????", "todo3": "profit!"}
    return {name: {id: {"task": task} for id, task in tasks.items()} for name in NAMES}


def is_password(name: str, password: str) -> bool:
    return name in HASHES and check_password_hash(HASHES[name], password)
