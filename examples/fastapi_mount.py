"""The service under /api of a FastAPI app: a2wsgi runs it in threads of its own.

Run it: cd examples && gunicorn -k asgi fastapi_mount:app
Then: curl localhost:8000/api/health
"""

from a2wsgi import WSGIMiddleware
from fastapi import FastAPI

import service

app = FastAPI()


@app.get("/")
async def home() -> dict[str, str]:
    return {"message": "A route of FastAPI's; the to-dos are under /api."}


app.mount("/api", WSGIMiddleware(service.create_app()))
