-- The tables of a chat store in PostgreSQL. See backends/tables.py for what is in them.

CREATE TABLE chat_store (
    version INTEGER NOT NULL,
    made_by TEXT NOT NULL
);

CREATE TABLE entries (
    key TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    place TEXT NOT NULL CHECK (place IN ('document', 'log', 'pieces')),
    size BIGINT,
    id TEXT COLLATE "C" NOT NULL
);

-- By the number of the transaction, for transactions become visible in another order than they began in.
CREATE TABLE changes (
    transaction XID8 NOT NULL,
    id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    keys TEXT NOT NULL
);

CREATE INDEX changes_by_transaction ON changes (transaction);

CREATE TABLE pieces (
    id TEXT COLLATE "C" NOT NULL,
    number INTEGER NOT NULL,
    data BYTEA NOT NULL,
    PRIMARY KEY (id, number)
);

CREATE TABLE lines (
    key TEXT COLLATE "C" NOT NULL,
    position INTEGER NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (key, position),
    UNIQUE (key, id)
);

CREATE TABLE users (
    user_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    created_at TEXT,
    updated_at TEXT,
    body TEXT NOT NULL
);

CREATE TABLE personas (
    user_id TEXT COLLATE "C" NOT NULL,
    persona_id TEXT COLLATE "C" NOT NULL,
    name TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, persona_id)
);

CREATE TABLE sessions (
    user_id TEXT COLLATE "C" NOT NULL,
    session_id TEXT COLLATE "C" NOT NULL,
    title TEXT,
    created_at TEXT,
    updated_at TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
);

CREATE TABLE messages (
    user_id TEXT COLLATE "C" NOT NULL,
    session_id TEXT COLLATE "C" NOT NULL,
    position INTEGER NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    role TEXT,
    content TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, position),
    UNIQUE (user_id, session_id, id)
);

CREATE TABLE contexts (
    user_id TEXT COLLATE "C" NOT NULL,
    session_id TEXT COLLATE "C" NOT NULL,
    summary TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
);

CREATE TABLE context_snapshots (
    user_id TEXT COLLATE "C" NOT NULL,
    session_id TEXT COLLATE "C" NOT NULL,
    snapshot_id TEXT COLLATE "C" NOT NULL,
    summary TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, snapshot_id)
);

CREATE TABLE documents (
    user_id TEXT COLLATE "C" NOT NULL,
    session_id TEXT COLLATE "C" NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id)
);

CREATE TABLE analyses (
    user_id TEXT COLLATE "C" NOT NULL,
    session_id TEXT COLLATE "C" NOT NULL,
    document TEXT COLLATE "C" NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (user_id, session_id, document)
);

CREATE TABLE panels (
    panel_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    type TEXT,
    created_at TEXT,
    body TEXT NOT NULL
);

CREATE TABLE panel_messages (
    panel_id TEXT COLLATE "C" NOT NULL,
    position INTEGER NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    role TEXT,
    content TEXT,
    timestamp TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, position),
    UNIQUE (panel_id, id)
);

CREATE TABLE panel_personas (
    panel_id TEXT COLLATE "C" NOT NULL,
    persona_id TEXT COLLATE "C" NOT NULL,
    name TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, persona_id)
);

CREATE TABLE insights (
    panel_id TEXT COLLATE "C" NOT NULL,
    insight_id TEXT COLLATE "C" NOT NULL,
    created_at TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (panel_id, insight_id)
);

CREATE TABLE global_personas (
    persona_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    name TEXT,
    body TEXT NOT NULL
);

-- Words of messages, for searching; they are made of the messages, and `chatdb reindex` makes them anew.

CREATE TABLE word_logs (
    number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key TEXT COLLATE "C" NOT NULL,
    edition TEXT COLLATE "C" NOT NULL,
    records INTEGER NOT NULL,
    tokens BIGINT NOT NULL,
    UNIQUE (key, edition)
);

CREATE TABLE words (
    log BIGINT NOT NULL REFERENCES word_logs (number) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    moment BIGINT,
    tokens INTEGER NOT NULL,
    lexemes TSVECTOR NOT NULL,
    PRIMARY KEY (log, position)
);

CREATE INDEX words_lexemes ON words USING gin (lexemes);
