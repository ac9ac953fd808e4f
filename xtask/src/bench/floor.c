/* The floor: the least that a mirrored write can cost on this machine.  No protocol features, no recovery, no checks, one
 * thread a process, io_uring for the disk and the receives.  A yardstick, not a design: what it reaches is close to the
 * ceiling for anything that moves the same bytes between the same processes.
 *
 *   floor secondary ADDRESS:PORT FILE          receive over TCP, write, acknowledge
 *   floor primary SOCK ADDRESS:PORT FILE       unix socket in; write here and there; answer when both are done; serves
 *                                              one client, then ends
 * FLOOR_SPIN_US=n in the environment: look for completions that long before sleeping.
 * Requests and answers are `struct msg` and `struct ack` below; `cargo xtask bench` builds, starts and drives both.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 64
#define MAXIO (1 << 20)
#define STREAM (256 << 10)

enum { READ, WRITE, FLUSH };
struct msg { uint32_t op, len; uint64_t off, id; };
struct ack { uint64_t id; int64_t res; };

static void die(const char *what) { perror(what); exit(1); }
static uint64_t now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000ull + t.tv_nsec; }
static void *aligned(size_t n) { void *p; if (posix_memalign(&p, 4096, n)) die("memalign"); memset(p, 0x5a, n); return p; }

static struct sockaddr_in where(const char *w) {      /* PORT on loopback, or ADDRESS:PORT */
    const char *colon = strchr(w, ':');
    char host[64] = "127.0.0.1";
    if (colon) snprintf(host, sizeof host, "%.*s", (int)(colon - w), w);
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(atoi(colon ? colon + 1 : w)) };
    inet_aton(host, &a.sin_addr);
    return a;
}
static int tcp_listen(const char *w) {
    int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = where(w);
    if (bind(s, (void *)&a, sizeof a) || listen(s, 1)) die("listen");
    return s;
}
static void tune(int s) {
    int one = 1, buf = 8 << 20;
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(s, SOL_SOCKET, SO_SNDBUF, &buf, sizeof buf);
    setsockopt(s, SOL_SOCKET, SO_RCVBUF, &buf, sizeof buf);
}
static int tcp_connect(const char *w) {
    struct sockaddr_in a = where(w);
    for (int i = 0; i < 200; i++) {
        int s = socket(AF_INET, SOCK_STREAM, 0);
        tune(s);
        if (!connect(s, (void *)&a, sizeof a)) return s;
        close(s); usleep(20000);
    }
    die("connect"); return -1;
}
static int unix_listen(const char *p) {
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    strncpy(a.sun_path, p, sizeof a.sun_path - 1);
    if (bind(s, (void *)&a, sizeof a) || listen(s, 1)) die("unix listen");
    return s;
}
/* Gathered blocking sends: everything queued in one turn of the loop leaves in one call. */
struct out { int fd; struct iovec v[4 * SLOTS]; int n; };
static void out_add(struct out *o, void *p, size_t n) { o->v[o->n].iov_base = p; o->v[o->n++].iov_len = n; }
static void out_flush(struct out *o) {
    int i = 0;
    while (i < o->n) {
        ssize_t r = writev(o->fd, o->v + i, o->n - i);
        if (r < 0) { if (errno == EINTR) continue; exit(0); }
        while (i < o->n && (size_t)r >= o->v[i].iov_len) r -= o->v[i++].iov_len;
        if (i < o->n) { o->v[i].iov_base = (char *)o->v[i].iov_base + r; o->v[i].iov_len -= r; }
    }
    o->n = 0;
}

/* A stream of frames read by io_uring; large bodies land straight in their slot. */
struct in { int fd; char *buf; size_t have; char *direct; size_t want; };
enum { T_RECV_UP = 1, T_RECV_PEER, T_DISK };
#define TAG(t, i) (((uint64_t)(t) << 32) | (uint32_t)(i))

static struct io_uring ring;
static void in_arm(struct in *s, int tag) {
    struct io_uring_sqe *e = io_uring_get_sqe(&ring);
    if (s->want) io_uring_prep_recv(e, s->fd, s->direct, s->want, 0);
    else io_uring_prep_recv(e, s->fd, s->buf + s->have, STREAM - s->have, 0);
    io_uring_sqe_set_data64(e, TAG(tag, 0));
}

struct slot { struct msg m; struct ack a; char *data; int left; uint64_t up_id; int used; };
static struct slot slots[SLOTS];
static int file_fd, up_fd = -1, peer_fd = -1;
static struct out up, peer;
static struct in in_up, in_peer;

static void disk(int i) {
    struct slot *s = &slots[i];
    struct io_uring_sqe *e = io_uring_get_sqe(&ring);
    if (s->m.op == WRITE) io_uring_prep_write(e, file_fd, s->data, s->m.len, s->m.off);
    else if (s->m.op == READ) io_uring_prep_read(e, file_fd, s->data, s->m.len, s->m.off);
    else io_uring_prep_fsync(e, file_fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data64(e, TAG(T_DISK, i));
}
static void start(int i) {            /* a request is complete in its slot: here and there */
    struct slot *s = &slots[i];
    s->left = 1;
    if (s->m.op != READ && peer_fd >= 0) {
        s->left = 2;
        s->m.id = i;
        out_add(&peer, &s->m, sizeof s->m);
        if (s->m.op == WRITE) out_add(&peer, s->data, s->m.len);
    }
    disk(i);
}

static void finish(int i) {
    struct slot *s = &slots[i];
    if (--s->left) return;
    s->a = (struct ack){ s->up_id, 0 };
    out_add(&up, &s->a, sizeof s->a);
    if (s->m.op == READ) out_add(&up, s->data, s->m.len);
    s->used = 0;                      /* reused only after out_flush at the end of this turn */
}

static int cur = -1;   /* the request now arriving from up */
static int new_slot(void) { for (int i = 0; i < SLOTS; i++) if (!slots[i].used) { slots[i].used = 1; return i; } fprintf(stderr, "slots\n"); exit(1); }
static void parse_up(ssize_t r) {
    struct in *s = &in_up;
    if (s->want) {
        s->direct += r; s->want -= r;
        if (!s->want) { int i = cur; cur = -1; start(i); }
        return;
    }
    s->have += r;
    size_t p = 0;
    while (cur < 0) {
        if (s->have - p < sizeof(struct msg)) break;
        int i = new_slot();
        memcpy(&slots[i].m, s->buf + p, sizeof(struct msg));
        slots[i].up_id = slots[i].m.id;
        p += sizeof(struct msg);
        if (slots[i].m.op != WRITE) { start(i); continue; }
        size_t n = slots[i].m.len, h = s->have - p < n ? s->have - p : n;
        if (h == n) { memcpy(slots[i].data, s->buf + p, n); p += n; start(i); }
        else {                         /* the rest comes straight into the slot */
            memcpy(slots[i].data, s->buf + p, h); p += h;
            cur = i; s->direct = slots[i].data + h; s->want = n - h;
        }
    }
    memmove(s->buf, s->buf + p, s->have - p);
    s->have -= p;
}
static void parse_peer(ssize_t r) {
    struct in *s = &in_peer;
    s->have += r;
    size_t p = 0;
    for (; s->have - p >= sizeof(struct ack); p += sizeof(struct ack)) {
        struct ack a; memcpy(&a, s->buf + p, sizeof a);
        finish(a.id);
    }
    memmove(s->buf, s->buf + p, s->have - p);
    s->have -= p;
}

static uint64_t spin_ns;
static void loop(void) {
    in_up = (struct in){ .fd = up_fd, .buf = aligned(STREAM) }; up.fd = up_fd; in_arm(&in_up, T_RECV_UP);
    if (peer_fd >= 0) { in_peer = (struct in){ .fd = peer_fd, .buf = aligned(STREAM) }; peer.fd = peer_fd; in_arm(&in_peer, T_RECV_PEER); }
    for (;;) {
        if (peer.n) out_flush(&peer);
        if (up.n) out_flush(&up);
        if (spin_ns) {                   /* look for a while before sleeping: a wake-up across CPUs is dear in a VM */
            io_uring_submit(&ring);
            uint64_t until = now() + spin_ns;
            while (!io_uring_cq_ready(&ring) && now() < until) io_uring_get_events(&ring);
        }
        io_uring_submit_and_wait(&ring, 1);
        struct io_uring_cqe *c; unsigned head, n = 0;
        io_uring_for_each_cqe(&ring, head, c) {
            n++;
            uint64_t u = c->user_data; int t = u >> 32, i = (uint32_t)u;
            if (t == T_DISK) {
                if (c->res < 0 || (uint32_t)c->res != slots[i].m.len) { fprintf(stderr, "disk: %d\n", c->res); exit(1); }
                finish(i);
            } else {
                if (c->res <= 0) exit(0);
                if (t == T_RECV_UP) { parse_up(c->res); in_arm(&in_up, T_RECV_UP); }
                else { parse_peer(c->res); in_arm(&in_peer, T_RECV_PEER); }
            }
        }
        io_uring_cq_advance(&ring, n);
    }
}

int main(int n, char **v) {
    signal(SIGPIPE, SIG_IGN); signal(SIGCHLD, SIG_IGN);
    if (getenv("FLOOR_SPIN_US")) spin_ns = 1000ull * atoi(getenv("FLOOR_SPIN_US"));
    if (n < 4) return 2;
    for (int i = 0; i < SLOTS; i++) slots[i].data = aligned(MAXIO);
    struct io_uring_params prm = { .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_COOP_TASKRUN };
    if (io_uring_queue_init_params(256, &ring, &prm)) die("io_uring");
    if (!strcmp(v[1], "secondary")) {
        int l = tcp_listen(v[2]);
        if ((file_fd = open(v[3], O_RDWR | O_DIRECT)) < 0) die(v[3]);
        for (;;) {                         /* one connection after another, each in a child of its own */
            int c = accept(l, 0, 0);
            if (!fork()) {
                tune(c); up_fd = c; io_uring_queue_exit(&ring);
                if (io_uring_queue_init_params(256, &ring, &prm)) die("io_uring");
                loop();
            }
            close(c);
        }
    }
    if (!strcmp(v[1], "primary")) {
        int l = unix_listen(v[2]);
        peer_fd = tcp_connect(v[3]);
        if ((file_fd = open(v[4], O_RDWR | O_DIRECT)) < 0) die(v[4]);
        up_fd = accept(l, 0, 0);
        loop();
    }
    return 0;
}
