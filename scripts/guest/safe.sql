-- A commit is durable when it returns: FULL is enough with a write-ahead log (with a rollback journal, whose removal is the
-- commit, it would take EXTRA). The log is emptied often, so that the file of the database itself is under way when it breaks.
PRAGMA synchronous = FULL;
PRAGMA wal_autocheckpoint = 50;
