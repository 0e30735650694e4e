-- The tables of a chat store in SQLite. See backends/tables.py for what is in them.

CREATE TABLE entries (
    key TEXT NOT NULL PRIMARY KEY,
    place TEXT NOT NULL CHECK (place IN ('document', 'log', 'pieces')),
    size INTEGER,
    id TEXT NOT NULL
) WITHOUT ROWID, STRICT;

CREATE TABLE changes (
    number INTEGER NOT NULL PRIMARY KEY,
    id TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    keys TEXT NOT NULL
) STRICT;

CREATE TABLE pieces (
    id TEXT NOT NULL,
    number INTEGER NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (id, number)
) STRICT;

CREATE TABLE users (
    user_id TEXT NOT NULL PRIMARY KEY,
    created_at TEXT,
    updated_at TEXT,
    body TEXT NOT NULL
) STRICT;

CREATE TABLE personas (
    user_id TEXT NOT NULL,
    persona_id TEXT NOT NULL,
    name TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, persona_id)
) STRICT;

CREATE TABLE sessions (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    title TEXT,
    created_at TEXT,
    updated_at TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
) STRICT;

CREATE TABLE contexts (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    summary TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
) STRICT;

CREATE TABLE context_snapshots (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    snapshot_id TEXT NOT NULL,
    summary TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, snapshot_id)
) STRICT;

CREATE TABLE documents (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
) STRICT;

CREATE TABLE analyses (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    document TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, document)
) STRICT;

CREATE TABLE panels (
    panel_id TEXT NOT NULL PRIMARY KEY,
    type TEXT,
    created_at TEXT,
    body TEXT NOT NULL
) STRICT;

CREATE TABLE panel_personas (
    panel_id TEXT NOT NULL,
    persona_id TEXT NOT NULL,
    name TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, persona_id)
) STRICT;

CREATE TABLE insights (
    panel_id TEXT NOT NULL,
    insight_id TEXT NOT NULL,
    created_at TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, insight_id)
) STRICT;

CREATE TABLE global_personas (
    persona_id TEXT NOT NULL PRIMARY KEY,
    name TEXT,
    body TEXT NOT NULL
) STRICT;

CREATE TABLE logs (
    log INTEGER NOT NULL PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    user_id TEXT,
    session_id TEXT,
    panel_id TEXT
) STRICT;

CREATE INDEX logs_of_sessions ON logs (user_id, session_id) WHERE session_id IS NOT NULL;

CREATE INDEX logs_of_panels ON logs (panel_id) WHERE panel_id IS NOT NULL;

CREATE TABLE records (
    place INTEGER NOT NULL PRIMARY KEY,
    id TEXT NOT NULL,
    body TEXT NOT NULL
) STRICT;

CREATE UNIQUE INDEX records_by_id ON records (id, place >> 32);

CREATE TABLE arrivals (
    number INTEGER NOT NULL PRIMARY KEY,
    place INTEGER NOT NULL UNIQUE,
    id TEXT NOT NULL,
    body TEXT NOT NULL
) STRICT;

CREATE UNIQUE INDEX arrivals_by_id ON arrivals (id, place >> 32);

-- U+0000 ends a text of SQLite, so it is shown as U+FFFD.
CREATE VIEW messages AS
    SELECT logs.user_id, logs.session_id, records.place & 4294967295 AS position, records.id,
        json_extract(records.body, '$.role') AS role,
        json_extract(CASE instr(records.body, '\u0000') WHEN 0 THEN records.body
            ELSE replace(replace(records.body, '\\', '\u005c'), '\u0000', '\ufffd') END, '$.content') AS content,
        json_extract(records.body, '$.timestamp') AS timestamp,
        records.body
    FROM logs JOIN records ON records.place BETWEEN logs.log << 32 AND (logs.log << 32) + 4294967295
    WHERE logs.session_id IS NOT NULL
    UNION ALL
    SELECT logs.user_id, logs.session_id, arrivals.place & 4294967295, arrivals.id,
        json_extract(arrivals.body, '$.role'),
        json_extract(CASE instr(arrivals.body, '\u0000') WHEN 0 THEN arrivals.body
            ELSE replace(replace(arrivals.body, '\\', '\u005c'), '\u0000', '\ufffd') END, '$.content'),
        json_extract(arrivals.body, '$.timestamp'),
        arrivals.body
    FROM logs JOIN arrivals ON arrivals.place BETWEEN logs.log << 32 AND (logs.log << 32) + 4294967295
    WHERE logs.session_id IS NOT NULL;

CREATE VIEW panel_messages AS
    SELECT logs.panel_id, records.place & 4294967295 AS position, records.id,
        json_extract(records.body, '$.role') AS role,
        json_extract(CASE instr(records.body, '\u0000') WHEN 0 THEN records.body
            ELSE replace(replace(records.body, '\\', '\u005c'), '\u0000', '\ufffd') END, '$.content') AS content,
        json_extract(records.body, '$.timestamp') AS timestamp,
        records.body
    FROM logs JOIN records ON records.place BETWEEN logs.log << 32 AND (logs.log << 32) + 4294967295
    WHERE logs.panel_id IS NOT NULL
    UNION ALL
    SELECT logs.panel_id, arrivals.place & 4294967295, arrivals.id,
        json_extract(arrivals.body, '$.role'),
        json_extract(CASE instr(arrivals.body, '\u0000') WHEN 0 THEN arrivals.body
            ELSE replace(replace(arrivals.body, '\\', '\u005c'), '\u0000', '\ufffd') END, '$.content'),
        json_extract(arrivals.body, '$.timestamp'),
        arrivals.body
    FROM logs JOIN arrivals ON arrivals.place BETWEEN logs.log << 32 AND (logs.log << 32) + 4294967295
    WHERE logs.panel_id IS NOT NULL;

CREATE VIEW lines AS
    SELECT logs.key, records.place & 4294967295 AS position, records.id, records.body
    FROM logs JOIN records ON records.place BETWEEN logs.log << 32 AND (logs.log << 32) + 4294967295
    WHERE logs.session_id IS NULL AND logs.panel_id IS NULL
    UNION ALL
    SELECT logs.key, arrivals.place & 4294967295, arrivals.id, arrivals.body
    FROM logs JOIN arrivals ON arrivals.place BETWEEN logs.log << 32 AND (logs.log << 32) + 4294967295
    WHERE logs.session_id IS NULL AND logs.panel_id IS NULL;
