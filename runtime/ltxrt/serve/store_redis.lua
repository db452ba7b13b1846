-- SPDX-License-Identifier: Apache-2.0
-- Every operation of the job store on Redis. A call is one operation, and nothing else runs meanwhile: each change of
-- state looks at the state that it comes from, so that of two who want to change the same job only one succeeds.
--
-- KEYS[1]: what every key begins with. ARGV: operation, seconds that a finished job is kept, seconds of a lease, the
-- front end that asks, then the operation's own arguments. Redis' own clock is the only one that counts.
--
--   job:ID             hash of the job's fields; None is a field that is not there
--   state:STATE        jobs in that state by seq, the order in which they came
--   owner:OWNER        an owner's jobs by seq           keys:OWNER     idempotency key to job
--   events:job:ID      events by number                 events:owner:OWNER     the same
--   expiry             finished jobs by the end of their time
--   ended              jobs whose end no front end has seen to
--   recent             how long the last clips took
--   leases             workers by the time up to which they count as alive
--   held:SERVER        that front end's workers take no jobs
--   claim:NONCE        what a call of claim took, should it be repeated

local retention, lease, server = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local MOST_ATTEMPTS, RECENT, HELD_SECONDS, NONCE_SECONDS = 2, 20, 86400, 60
local call = redis.call
local clock = call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local function key(...) return KEYS[1] .. table.concat({...}, ':') end

-- Lua's own would keep 14 digits.
local function exactly(number) return string.format('%.17g', number) end

local function job(id) return call('HGETALL', key('job', id)) end

local function jobs(ids)
  local found = {}
  for index, id in ipairs(ids) do found[index] = job(id) end
  return found
end

local function note(id, kind, data)
  local number = call('INCR', key('number'))
  local event = table.concat({number, id, kind, data}, '\n')
  call('ZADD', key('events', 'job', id), number, event)
  call('ZADD', key('events', 'owner', call('HGET', key('job', id), 'owner')), number, event)
  call('PUBLISH', key('changes'), kind .. ' ' .. id)
end

local function move(id, state)
  local before, seq = unpack(call('HMGET', key('job', id), 'state', 'seq'))
  call('ZREM', key('state', before), id)
  call('ZADD', key('state', state), seq, id)
  call('HSET', key('job', id), 'state', state)
end

local function finish(id, state, outcome)
  local name = key('job', id)
  local started, expires = unpack(call('HMGET', name, 'started_at', 'expires_at'))
  expires = math.min(tonumber(expires or math.huge), now + retention)
  move(id, state)
  call('HDEL', name, 'seconds_left')
  call('HSET', name, 'completed_at', exactly(now), 'expires_at', exactly(expires))
  for field, value in pairs(outcome) do call('HSET', name, field, value) end
  call('ZADD', key('expiry'), exactly(expires), id)
  call('RPUSH', key('ended'), id)
  if state == 'succeeded' then
    call('LPUSH', key('recent'), exactly(now - tonumber(started)))
    call('LTRIM', key('recent'), 0, RECENT - 1)
  end
  outcome.result = nil
  note(id, state, cjson.encode(outcome))
end

local function failure(kind, message) return {error_type = kind, error_message = message} end

-- What a worker that is no more was at: queued again once, in its old place.
local function lose(id)
  local name = key('job', id)
  local cancel, attempts = unpack(call('HMGET', name, 'cancel_requested', 'attempts'))
  if cancel == '1' then
    finish(id, 'cancelled', {})
  elseif tonumber(attempts) >= MOST_ATTEMPTS then
    finish(id, 'failed', failure('interrupted', 'its worker was lost twice while it ran'))
  else
    move(id, 'queued')
    call('HDEL', name, 'worker', 'stage', 'seconds_left')
    call('HSET', name, 'step', 0, 'steps', 0, 'progress', 0)
    note(id, 'queued', '{}')
  end
end

-- The running jobs of the workers for which a test holds.
local function running(test)
  local found = {}
  for _, id in ipairs(call('ZRANGE', key('state', 'processing'), 0, -1)) do
    if test(call('HGET', key('job', id), 'worker')) then found[#found + 1] = id end
  end
  return found
end

local function server_of(worker) return string.match(worker, '^(.*)/') or '' end

local function belongs(id, worker)
  local state, its = unpack(call('HMGET', key('job', id), 'state', 'worker'))
  return state == 'processing' and its == worker
end

local op = {}

function op.open(version)
  call('SETNX', key('schema'), version)
  return call('GET', key('schema'))
end

function op.add(id, owner, most, ...)
  local idempotency = nil
  local fields = {...}
  for index = 1, #fields, 2 do
    if fields[index] == 'idempotency_key' then idempotency = fields[index + 1] end
  end
  if call('EXISTS', key('job', id)) == 1 then return {'added', job(id)} end  -- asked again, the answer was lost
  local earlier = idempotency and call('HGET', key('keys', owner), idempotency)
  if earlier then return {'used', job(earlier)} end
  if call('ZCARD', key('state', 'queued')) >= tonumber(most) then return {'full', {}} end
  local seq = call('INCR', key('seq'))
  call('HSET', key('job', id), 'id', id, 'owner', owner, 'seq', seq, 'state', 'queued', 'created_at', exactly(now),
    'attempts', 0, 'step', 0, 'steps', 0, 'progress', 0, 'cancel_requested', 0, unpack(fields))
  call('ZADD', key('state', 'queued'), seq, id)
  call('ZADD', key('owner', owner), seq, id)
  if idempotency then call('HSET', key('keys', owner), idempotency, id) end
  note(id, 'queued', '{}')
  return {'added', job(id)}
end

op.get = job

function op.by_key(owner, idempotency)
  local id = call('HGET', key('keys', owner), idempotency)
  return id and job(id) or {}
end

function op.of_owner(owner, limit, ...)
  limit = tonumber(limit)
  if select('#', ...) == 0 then return jobs(call('ZREVRANGE', key('owner', owner), 0, limit - 1)) end
  local found = {}
  for _, state in ipairs({...}) do
    local scored = call('ZINTER', 2, key('owner', owner), key('state', state), 'AGGREGATE', 'MAX', 'WITHSCORES')
    for index = 1, #scored, 2 do found[#found + 1] = {scored[index], tonumber(scored[index + 1])} end
  end
  table.sort(found, function(a, b) return a[2] > b[2] end)
  local ids = {}
  for index = 1, math.min(limit, #found) do ids[index] = found[index][1] end
  return jobs(ids)
end

function op.count(...)
  local sum = 0
  for _, state in ipairs({...}) do sum = sum + call('ZCARD', key('state', state)) end
  return sum
end

function op.position(id)
  local seq = call('HGET', key('job', id), 'seq')
  return seq and call('ZCOUNT', key('state', 'queued'), '-inf', '(' .. seq) or 0
end

function op.recent() return call('LRANGE', key('recent'), 0, -1) end

function op.cancel(id)
  local state = call('HGET', key('job', id), 'state')
  if state == 'queued' then
    finish(id, 'cancelled', {})
  elseif state == 'processing' then
    call('HSET', key('job', id), 'cancel_requested', 1)
  end
  return job(id)
end

function op.hold(on)
  if on == '1' then
    call('SET', key('held', server), 1, 'EX', HELD_SECONDS)  -- it ends within that time, or has long crashed
  else
    call('DEL', key('held', server))
  end
end

function op.busy() return #running(function(worker) return server_of(worker) == server end) end

function op.reclaim()
  local lost = running(function(worker)
    local alive_until = call('ZSCORE', key('leases'), worker)
    return not alive_until or tonumber(alive_until) <= now
  end)
  for _, id in ipairs(lost) do lose(id) end
  call('ZREMRANGEBYSCORE', key('leases'), '-inf', exactly(now))
  return lost
end

function op.requeue(worker)
  local lost = running(function(other) return other == worker end)
  for _, id in ipairs(lost) do lose(id) end
  call('ZREM', key('leases'), worker)
  return lost
end

function op.bury(worker, kind, message)
  local lost = running(function(other) return other == worker end)
  for _, id in ipairs(lost) do finish(id, 'failed', failure(kind, message)) end
  call('ZREM', key('leases'), worker)
  return lost
end

function op.take_ended() return call('LPOP', key('ended'), 100) or {} end

function op.expire(id)
  if call('EXISTS', key('job', id)) == 0 then return end
  call('HSET', key('job', id), 'expires_at', exactly(now))
  call('ZADD', key('expiry'), 'XX', exactly(now), id)
end

function op.expired(time) return call('ZRANGEBYSCORE', key('expiry'), '-inf', time) end

function op.forget(id)
  local name = key('job', id)
  local owner, state, completed, idempotency =
    unpack(call('HMGET', name, 'owner', 'state', 'completed_at', 'idempotency_key'))
  if not completed then return end
  for _, event in ipairs(call('ZRANGE', key('events', 'job', id), 0, -1)) do
    call('ZREM', key('events', 'owner', owner), event)
  end
  if idempotency then call('HDEL', key('keys', owner), idempotency) end
  call('ZREM', key('state', state), id)
  call('ZREM', key('owner', owner), id)
  call('ZREM', key('expiry'), id)
  call('DEL', name, key('events', 'job', id))
end

function op.events(kind, name, after, limit)
  return call('ZRANGEBYSCORE', key('events', kind, name), '(' .. after, '+inf', 'LIMIT', 0, limit)
end

function op.last_event() return tonumber(call('GET', key('number')) or 0) end

function op.claim(worker, nonce)
  local again = call('GET', key('claim', nonce))
  if again then return job(again) end
  if call('EXISTS', key('held', server_of(worker))) == 1 then return {} end
  local id = call('ZRANGE', key('state', 'queued'), 0, 0)[1]
  if not id then return {} end
  move(id, 'processing')
  call('HSET', key('job', id), 'worker', worker, 'started_at', exactly(now))
  call('HINCRBY', key('job', id), 'attempts', 1)
  call('ZADD', key('leases'), exactly(now + lease), worker)
  call('SET', key('claim', nonce), id, 'EX', NONCE_SECONDS)
  note(id, 'processing', '{}')
  return job(id)
end

function op.advance(id, worker, data, stage, step, steps, progress, left)
  if not belongs(id, worker) then return 0 end
  local name = key('job', id)
  call('HSET', name, 'stage', stage, 'step', step, 'steps', steps, 'progress', progress)
  if left then call('HSET', name, 'seconds_left', left) else call('HDEL', name, 'seconds_left') end
  note(id, 'progress', data)
  return call('HGET', name, 'cancel_requested') == '0' and 1 or 0
end

function op.finish(id, worker, state, ...)
  if not belongs(id, worker) then return 0 end
  local outcome, fields = {}, {...}
  for index = 1, #fields, 2 do outcome[fields[index]] = fields[index + 1] end
  finish(id, state, outcome)
  return 1
end

function op.renew(worker) call('ZADD', key('leases'), exactly(now + lease), worker) end

function op.workers() return call('ZCOUNT', key('leases'), '(' .. exactly(now), '+inf') end

return op[ARGV[1]](unpack(ARGV, 5))
