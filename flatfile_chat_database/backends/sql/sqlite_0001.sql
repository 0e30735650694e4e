-- The tables of a chat store in SQLite. See backends/tables.py for what is in them.

CREATE TABLE entries (
    key TEXT NOT NULL PRIMARY KEY,
    place TEXT NOT NULL CHECK (place IN ('document', 'log', 'pieces')),
    size INTEGER,
    id TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE changes (
    number INTEGER NOT NULL PRIMARY KEY,
    id TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    keys TEXT NOT NULL
);

CREATE TABLE pieces (
    id TEXT NOT NULL,
    number INTEGER NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (id, number)
);

CREATE TABLE lines (
    key TEXT NOT NULL,
    position INTEGER NOT NULL,
    id TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (key, position),
    UNIQUE (key, id)
) WITHOUT ROWID;

CREATE TABLE users (
    user_id TEXT NOT NULL PRIMARY KEY,
    created_at TEXT,
    updated_at TEXT,
    body TEXT NOT NULL
);

CREATE TABLE personas (
    user_id TEXT NOT NULL,
    persona_id TEXT NOT NULL,
    name TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, persona_id)
);

CREATE TABLE sessions (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    title TEXT,
    created_at TEXT,
    updated_at TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
);

CREATE TABLE messages (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    id TEXT NOT NULL,
    role TEXT,
    content TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, position),
    UNIQUE (user_id, session_id, id)
) WITHOUT ROWID;

CREATE TABLE contexts (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    summary TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
);

CREATE TABLE context_snapshots (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    snapshot_id TEXT NOT NULL,
    summary TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, snapshot_id)
);

CREATE TABLE documents (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
);

CREATE TABLE analyses (
    user_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    document TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, document)
);

CREATE TABLE panels (
    panel_id TEXT NOT NULL PRIMARY KEY,
    type TEXT,
    created_at TEXT,
    body TEXT NOT NULL
);

CREATE TABLE panel_messages (
    panel_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    id TEXT NOT NULL,
    role TEXT,
    content TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, position),
    UNIQUE (panel_id, id)
) WITHOUT ROWID;

CREATE TABLE panel_personas (
    panel_id TEXT NOT NULL,
    persona_id TEXT NOT NULL,
    name TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, persona_id)
);

CREATE TABLE insights (
    panel_id TEXT NOT NULL,
    insight_id TEXT NOT NULL,
    created_at TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, insight_id)
);

CREATE TABLE global_personas (
    persona_id TEXT NOT NULL PRIMARY KEY,
    name TEXT,
    body TEXT NOT NULL
);
