-- wrk -s wrk.lua URL -- METHOD PATH BEARER BODY      the same request, over and over
-- wrk -s wrk.lua URL -- REFRESH TOKEN TOKEN …        each thread refreshes a session of its own:
--                                                    as many threads, and connections, as tokens
-- Prints a line: requests, seconds, answers of 400 and more, broken connections, p50 and p99 in µs.

local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  wrk.headers["Content-Type"] = "application/json"
  if args[1] == "REFRESH" then
    refresh(args[1 + number])
  else
    wrk.method, wrk.path = args[1], args[2]
    wrk.body = args[4] ~= "" and args[4] or nil
    if args[3] ~= "" then
      wrk.headers["Authorization"] = "Bearer " .. args[3]
    end
  end
end

function refresh(token)
  wrk.method, wrk.path = "POST", "/token"
  function request()
    wrk.body = '{"grant_type": "refresh_token", "refresh_token": "' .. token .. '"}'
    return wrk.format()
  end
  function response(status, headers, body)
    token = body:match('"refresh_token": *"([^"]+)"') or token
  end
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    "RESULT %d %f %d %d %f %f",
    summary.requests, summary.duration / 1e6,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
