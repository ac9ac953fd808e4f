-- Whole, without a gap, each row as it was written, and each transaction with both of its halves.
WITH state AS (
    SELECT (SELECT group_concat(integrity_check, '; ') FROM pragma_integrity_check) AS integrity,
        (SELECT count(*) FROM rows) AS count,
        (SELECT ifnull(max(number), 0) FROM rows) AS last,
        (SELECT count(*) FROM rows WHERE body <> printf('%06d-%0400d', number * 7919 % 1000003, number)) AS changed,
        (SELECT count FROM total) AS total
)
SELECT CASE
    WHEN integrity = 'ok' AND count = last AND count = total AND changed = 0 THEN 'found ' || last
    ELSE 'damaged: ' || integrity || '; ' || count || ' rows up to ' || last || ', ' || changed || ' changed, total ' || total
END FROM state;
