// The program that the lab's guest exists for: it proves, record by record, that no acknowledged write is lost.
//
// It appends numbered records to a file, fsyncs each, and only then prints `ack N` on its standard output (the guest's
// serial console). When it starts it reads the file again and prints `found N`: records 1..N are all there, whole and
// in order. Whoever saw `ack A` before a failure and `found F` after it knows that nothing was lost if F >= A.
//
// The records are a chain: each carries the checksum of the one before, so records of another run of the same guest
// can not pass for those of this one. As only one record is ever under way, at most the last place of the file may
// hold an unfinished one after a crash; it was never acknowledged and is cut off. Anything else that does not fit is
// printed as `damaged at K`; then nothing is appended any more, so that the evidence stays.
//
// A connection to the TCP port is told `N\n`, the last acknowledged number, or `damaged at K\n`, and closed.
// Usage: writer FILE PORT

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// 50 records a second: enough for hundreds in a short demonstration, and little enough that two nodes and two
// software-emulated processors on one small machine are not kept busy by it.
#define PACE_NS 20000000LL
// 32 MB, more than five hours at this pace: reading it again at the start still takes only a moment, and the disk is
// never filled. Then `full at N` is printed and the program only answers.
#define RECORDS_MAX 1000000ULL

struct record {
    uint64_t number;
    uint64_t unix_ms; // when it was written by the guest's clock; for people
    uint64_t previous; // checksum of the record before; 0 for the first
    uint64_t checksum; // of the 24 bytes before (FNV-1a)
};

static uint64_t checksum_of(const struct record *record) {
    const unsigned char *byte = (const unsigned char *)record;
    uint64_t hash = 0xcbf29ce484222325ULL;
    for (size_t i = 0; i < offsetof(struct record, checksum); i++)
        hash = (hash ^ byte[i]) * 0x100000001b3ULL;
    return hash;
}

// One write(2) a line, so that lines are never mixed with those of others on the console.
static void say(const char *format, ...) {
    char line[128];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (write(1, line, length) != length) { /* nobody to tell */ }
}

static void die(const char *what) {
    say("writer: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Reads the file; `last` becomes its last good record. Returns 0, or the number of the first damaged record.
static uint64_t verify(int file, struct record *last) {
    struct stat status;
    if (fstat(file, &status) < 0) die("stat");
    uint64_t size = status.st_size;
    static struct record chunk[2048];
    uint64_t at = 0;
    while (at < size) {
        ssize_t got = pread(file, chunk, sizeof chunk, at);
        if (got < 0) {
            if (errno == EINTR) continue;
            say("writer: read at %llu: %s\n", (unsigned long long)at, strerror(errno));
            return last->number + 1;
        }
        if (got == 0) break;
        size_t whole = got / sizeof chunk[0];
        for (size_t i = 0; i < whole; i++, at += sizeof chunk[0]) {
            const struct record *record = &chunk[i];
            if (record->number == last->number + 1 && record->previous == last->checksum
                && record->checksum == checksum_of(record)) {
                *last = *record;
                continue;
            }
            if (at + sizeof chunk[0] < size) return last->number + 1;
            goto cut;
        }
        if (whole == 0) break;
    }
cut:
    if (at < size && (ftruncate(file, at) < 0 || fsync(file) < 0)) die("cut off the unfinished record");
    return 0;
}

static int listen_on(int port) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    if (listener < 0 || bind(listener, (void *)&address, sizeof address) < 0 || listen(listener, 16) < 0) die("listen");
    return listener;
}

// Answers whoever asks until `until` (monotonic nanoseconds).
static void serve(int listener, int64_t until, uint64_t number, uint64_t damaged) {
    for (;;) {
        int64_t left = until - now_ns(CLOCK_MONOTONIC);
        if (left < 0) left = 0;
        struct timespec timeout = { left / 1000000000LL, left % 1000000000LL };
        struct pollfd waiting = { .fd = listener, .events = POLLIN };
        if (ppoll(&waiting, 1, &timeout, NULL) <= 0) {
            if (left == 0) return;
            continue;
        }
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (client < 0) continue;
        char answer[64];
        int length = damaged ? snprintf(answer, sizeof answer, "damaged at %llu\n", (unsigned long long)damaged)
                             : snprintf(answer, sizeof answer, "%llu\n", (unsigned long long)number);
        send(client, answer, length, MSG_NOSIGNAL);
        close(client);
    }
}

int main(int count, char **argument) {
    if (count != 3) {
        say("usage: writer FILE PORT\n");
        return 2;
    }
    int file = open(argument[1], O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0) die(argument[1]);
    struct record last = { 0 };
    uint64_t damaged = verify(file, &last);
    if (damaged) say("damaged at %llu\n", (unsigned long long)damaged);
    else say("found %llu\n", (unsigned long long)last.number);

    int listener = listen_on(atoi(argument[2]));
    int64_t next = now_ns(CLOCK_MONOTONIC);
    while (!damaged && last.number < RECORDS_MAX) {
        struct record record = {
            .number = last.number + 1,
            .unix_ms = now_ns(CLOCK_REALTIME) / 1000000,
            .previous = last.checksum,
        };
        record.checksum = checksum_of(&record);
        if (pwrite(file, &record, sizeof record, last.number * sizeof record) != sizeof record) die("write");
        // After a failed fsync the page may count as clean although it is not on the disk: never try again.
        if (fsync(file) < 0) die("fsync");
        last = record;
        say("ack %llu\n", (unsigned long long)last.number);
        // A pause (frozen disk, stopped machine) is not made up for by a burst.
        int64_t now = now_ns(CLOCK_MONOTONIC);
        next = next + PACE_NS > now ? next + PACE_NS : now;
        serve(listener, next, last.number, 0);
    }
    if (!damaged) say("full at %llu\n", (unsigned long long)last.number);
    for (;;) serve(listener, now_ns(CLOCK_MONOTONIC) + 3600000000000LL, last.number, damaged);
}
