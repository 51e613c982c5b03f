"""All SQL of ``state.sqlite``: the schema, what the coordinator writes, what `status` reads.

Times are UTC in ISO 8601, sessions name one start of an agent, steps count from 0 over the whole
run, and a round's steps are ``first_step`` up to, not including, ``end_step`` (equal where the
round only evaluates). JSON holds figures and names of modules and machines, nothing of a text.

Law 6 stands in the schema. A round has one attempt at the most that is not void (index
``one_live_attempt``); a step belongs to a round that is open and within its steps (trigger
``steps_belong_to_open_rounds``), and no two rounds that are not void share steps (trigger
``rounds_share_no_step``); to a step each device contributes once, and to a round it delivers once
(primary keys). So no two rows of the view ``counted`` are of one step and device.
"""

from __future__ import annotations

from typing import Final

APPLICATION_ID: Final = 0x6873706C
"""``hspl`` in ASCII: what tells this file from any other SQLite database."""
SCHEMA_VERSION: Final = 1

SCHEMA: Final = """
CREATE TABLE starts (            -- of the coordinator
    start INTEGER PRIMARY KEY,
    began_at TEXT NOT NULL,
    resumed_round INTEGER,       -- of the checkpoint that it went on from; NULL: from the beginning
    ended_at TEXT,
    ending TEXT                  -- 'complete', or what stopped it; NULL: at work, or killed
) STRICT;

CREATE TABLE sessions (          -- devices, and their profiles
    device TEXT NOT NULL,
    session TEXT NOT NULL,
    joined_at TEXT NOT NULL,
    seen_at TEXT NOT NULL,       -- when it last joined, began a round, delivered or was gone
    profile TEXT,                -- JSON: what it says of itself; NULL: it was never let in
    measured TEXT,               -- JSON: what it measured, where it did
    outcome TEXT NOT NULL CHECK (outcome IN ('active', 'done', 'lost', 'left out', 'refused')),
    reason TEXT,
    PRIMARY KEY (device, session)
) STRICT;                        -- rowids: a wall clock may go back, the order of joining does not

CREATE TABLE plans (
    plan INTEGER PRIMARY KEY,
    split_layer INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    micro_batch INTEGER NOT NULL,
    in_flight INTEGER NOT NULL,
    ranks TEXT NOT NULL,         -- JSON: module -> rank
    scalings TEXT NOT NULL,      -- JSON: module -> alpha / rank
    UNIQUE (split_layer, batch, micro_batch, in_flight, ranks, scalings)
) STRICT;

CREATE TABLE rounds (
    round INTEGER NOT NULL CHECK (round >= 1),
    attempt INTEGER NOT NULL CHECK (attempt >= 1),
    start INTEGER NOT NULL REFERENCES starts,
    state TEXT NOT NULL CHECK (state IN ('open', 'closing', 'closed', 'void')),
    first_step INTEGER NOT NULL,
    end_step INTEGER NOT NULL CHECK (end_step >= first_step),
    server_ranks TEXT NOT NULL,  -- JSON: module -> rank of the server's copy
    opened_at TEXT NOT NULL,
    closed_at TEXT,              -- when it was aggregated, or became void
    ending TEXT,                 -- how it closed, or why it is void
    aggregation_error REAL,      -- relative, of all modules together (Frobenius)
    PRIMARY KEY (round, attempt)
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX one_live_attempt ON rounds (round) WHERE state <> 'void';

CREATE TRIGGER rounds_share_no_step BEFORE INSERT ON rounds
WHEN EXISTS (SELECT 1 FROM rounds
             WHERE state <> 'void'
               AND first_step < NEW.end_step AND NEW.first_step < end_step)
BEGIN SELECT RAISE(ABORT, 'a step belongs to one round'); END;

CREATE TABLE participants (      -- who had which plan in which round, and what came of it
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    device TEXT NOT NULL,
    session TEXT NOT NULL,
    plan INTEGER NOT NULL REFERENCES plans,
    alone INTEGER NOT NULL CHECK (alone IN (0, 1)),  -- it holds the whole model: no server's steps
    fresh INTEGER NOT NULL CHECK (fresh IN (0, 1)),  -- it held nothing of an earlier hand-back
    first_sequence INTEGER NOT NULL,                 -- where it began in the order of its data
    outcome TEXT NOT NULL CHECK (outcome IN ('in round', 'delivered', 'evaluated', 'late', 'lost',
                                             'refused', 'void', 'unknown')),
    reason TEXT,
    target_tokens INTEGER,       -- its weight in the aggregation; NULL: none
    PRIMARY KEY (round, attempt, device),
    FOREIGN KEY (round, attempt) REFERENCES rounds,
    FOREIGN KEY (device, session) REFERENCES sessions
) STRICT, WITHOUT ROWID;

CREATE TABLE steps (             -- closed ones
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    step INTEGER NOT NULL,
    closed_at TEXT NOT NULL,
    applied INTEGER NOT NULL CHECK (applied IN (0, 1)),  -- 0: the server's adapter stayed
    PRIMARY KEY (round, attempt, step),
    FOREIGN KEY (round, attempt) REFERENCES rounds
) STRICT, WITHOUT ROWID;

CREATE TRIGGER steps_belong_to_open_rounds BEFORE INSERT ON steps
WHEN NOT EXISTS (SELECT 1 FROM rounds
                 WHERE round = NEW.round AND attempt = NEW.attempt AND state = 'open'
                   AND NEW.step >= first_step AND NEW.step < end_step)
BEGIN SELECT RAISE(ABORT, 'a step belongs to an open round'); END;

CREATE TABLE contributions (     -- whose gradients are in a closed step
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    step INTEGER NOT NULL,
    device TEXT NOT NULL,
    target_tokens INTEGER NOT NULL,
    micro_batches INTEGER NOT NULL,
    PRIMARY KEY (round, attempt, step, device),
    FOREIGN KEY (round, attempt, step) REFERENCES steps,
    FOREIGN KEY (round, attempt, device) REFERENCES participants
) STRICT, WITHOUT ROWID;

CREATE VIEW devices AS           -- the latest session of each, and when it was first seen
SELECT device, session, sessions, first_seen_at, seen_at AS last_seen_at, outcome, reason,
       profile, measured
FROM (SELECT *, count(*) OVER of_device AS sessions, min(joined_at) OVER of_device AS first_seen_at,
             row_number() OVER (PARTITION BY device ORDER BY profile IS NULL, rowid DESC) AS newest
      FROM sessions WINDOW of_device AS (PARTITION BY device))
WHERE newest = 1;

CREATE VIEW counted AS           -- the gradients that are in the adapters of the last checkpoint
SELECT contributions.* FROM contributions JOIN rounds USING (round, attempt)
WHERE rounds.state = 'closed';
"""

# --- the coordinator starts, and ends ---------------------------------------------------------

END_KILLED_START: Final = """
UPDATE starts SET ending = 'it was killed' WHERE ending IS NULL
"""
END_SESSIONS: Final = """
UPDATE sessions SET outcome = :outcome, reason = :reason WHERE outcome = 'active'
"""
BEGIN_START: Final = """
INSERT INTO starts (began_at, resumed_round) VALUES (:now, :round) RETURNING start
"""
END_START: Final = """
UPDATE starts SET ended_at = :now, ending = :ending WHERE start = :start
"""
CLOSE_WHAT_IS_SAVED: Final = """
UPDATE rounds SET state = 'closed' WHERE state = 'closing' AND round <= :round
"""
MISSED_OUTCOMES: Final = """
UPDATE participants SET outcome = 'unknown'
WHERE outcome IN ('in round', 'delivered')
  AND (round, attempt) IN (SELECT round, attempt FROM rounds
                           WHERE state = 'open' AND round <= :round)
"""
CLOSE_WHAT_WAS_MISSED: Final = """
UPDATE rounds SET state = 'closed', ending = 'known from its checkpoint alone'
WHERE state = 'open' AND round <= :round
RETURNING round
"""

# --- devices ----------------------------------------------------------------------------------

JOIN: Final = """
INSERT INTO sessions (device, session, joined_at, seen_at, profile, outcome)
VALUES (:device, :session, :now, :now, :profile, 'active')
ON CONFLICT (device, session) DO UPDATE
SET seen_at = excluded.seen_at, profile = excluded.profile, outcome = 'active', reason = NULL
"""
TURN_AWAY: Final = """
INSERT INTO sessions (device, session, joined_at, seen_at, outcome, reason)
VALUES (:device, :session, :now, :now, 'refused', :reason)
ON CONFLICT (device, session) DO UPDATE SET seen_at = excluded.seen_at
"""
END_SESSION: Final = """
UPDATE sessions SET outcome = :outcome, reason = :reason, seen_at = :now
WHERE device = :device AND session = :session AND outcome = 'active'
"""
BEGAN: Final = """
UPDATE sessions SET seen_at = :now, measured = coalesce(:measured, measured)
WHERE device = :device AND session = :session
"""
DELIVERED: Final = """
UPDATE sessions SET seen_at = :now
WHERE (device, session) = (SELECT device, session FROM participants
                           WHERE round = :round AND attempt = :attempt AND device = :device)
"""

# --- a round ----------------------------------------------------------------------------------

VOID_FROM: Final = """
UPDATE rounds SET state = 'void', closed_at = :now, ending = :reason
WHERE round >= :round AND state <> 'void'
"""
VOID_OUTCOMES: Final = """
UPDATE participants SET outcome = 'void', target_tokens = NULL
WHERE outcome IN ('in round', 'delivered', 'evaluated', 'unknown')
  AND (round, attempt) IN (SELECT round, attempt FROM rounds
                           WHERE round >= :round AND state <> 'void')
"""
OPEN_ROUND: Final = """
INSERT INTO rounds (round, attempt, start, state, first_step, end_step, server_ranks, opened_at)
VALUES (:round, (SELECT coalesce(max(attempt), 0) + 1 FROM rounds WHERE round = :round),
        :start, 'open', :first_step, :end_step, :server_ranks, :now)
RETURNING attempt
"""
KEEP_PLAN: Final = """
INSERT INTO plans (split_layer, batch, micro_batch, in_flight, ranks, scalings)
VALUES (:split_layer, :batch, :micro_batch, :in_flight, :ranks, :scalings)
ON CONFLICT DO UPDATE SET batch = excluded.batch RETURNING plan
"""
TAKE_PART: Final = """
INSERT INTO participants (round, attempt, device, session, plan, alone, fresh, first_sequence,
                          outcome)
VALUES (:round, :attempt, :device, :session, :plan, :alone, :fresh, :first_sequence, 'in round')
"""
CLOSE_STEP: Final = """
INSERT INTO steps (round, attempt, step, closed_at, applied)
VALUES (:round, :attempt, :step, :now, :applied)
"""
CONTRIBUTE: Final = """
INSERT INTO contributions (round, attempt, step, device, target_tokens, micro_batches)
VALUES (:round, :attempt, :step, :device, :target_tokens, :micro_batches)
"""
DELIVER: Final = """
UPDATE participants SET outcome = 'delivered', reason = NULL
WHERE round = :round AND attempt = :attempt AND device = :device
"""
FALL_OUT: Final = """
UPDATE participants SET outcome = :outcome, reason = :reason
WHERE round = :round AND attempt = :attempt AND device = :device AND outcome = 'in round'
"""
REFUSE_UPDATE: Final = """
UPDATE participants SET outcome = 'refused', reason = 'its update was an outlier'
WHERE round = :round AND attempt = :attempt AND device = :device
"""
CLOSE_ROUND: Final = """
UPDATE rounds SET state = 'closing', closed_at = :now, ending = :ending, aggregation_error = :error
WHERE round = :round AND attempt = :attempt AND state = 'open'
"""
COUNT_TOKENS: Final = """
UPDATE participants SET target_tokens = :target_tokens
WHERE round = :round AND attempt = :attempt AND device = :device
"""
FORGET: Final = """
UPDATE participants SET outcome = 'lost', reason = 'it did not deliver'
WHERE round = :round AND attempt = :attempt AND outcome = 'in round'
"""
CONFIRM_ROUND: Final = """
UPDATE rounds SET state = 'closed' WHERE round = :round AND state = 'closing'
"""
EVALUATED: Final = """
UPDATE participants SET outcome = 'evaluated'
WHERE round = :round AND attempt = :attempt AND outcome = 'in round'
"""
CLOSE_EVALUATION: Final = """
UPDATE rounds SET state = 'closed', closed_at = :now, ending = 'it only evaluated'
WHERE round = :round AND attempt = :attempt AND state = 'open' AND first_step = end_step
RETURNING round
"""

# --- what `status` reads ----------------------------------------------------------------------

READ_STARTS: Final = "SELECT * FROM starts ORDER BY start"
READ_DEVICES: Final = "SELECT * FROM devices ORDER BY device"
READ_ROUNDS: Final = "SELECT * FROM rounds ORDER BY round, attempt"
READ_PARTICIPANTS: Final = """
SELECT participants.*, split_layer, batch, micro_batch, in_flight, ranks,
       (SELECT count(*) FROM contributions AS own
        WHERE (own.round, own.attempt, own.device)
            = (participants.round, participants.attempt, participants.device)) AS steps
FROM participants JOIN plans USING (plan)
ORDER BY round, attempt, device
"""
