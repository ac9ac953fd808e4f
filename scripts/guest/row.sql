BEGIN;
INSERT INTO rows SELECT count + 1, printf('%06d-%0400d', (count + 1) * 7919 % 1000003, count + 1) FROM total;
UPDATE total SET count = count + 1;
COMMIT;
SELECT 'ack ' || count FROM total;
