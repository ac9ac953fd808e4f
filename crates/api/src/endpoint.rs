//! Every endpoint in one table: the OpenAPI text and a test of `noded`'s router are made from it.
//!
//! All but `/v1/openapi.json` need the header `Authorization: Bearer TOKEN`. `{vm}`, `{volume}`, `{image}`, `{group}` and `{node}`
//! take a name or an id, `{disk}` an id, the first digits of one, or a path, `{kept}` what it is called in a list. Every error has the shape of `ApiError`. Changing requests answer `202` with `Accepted` when
//! the change is committed; the task says when the state that was asked for is reached.

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    /// `GET`, `POST` or `DELETE`.
    pub method: &'static str,
    pub path: &'static str,
    pub summary: &'static str,
    /// Query parameters: name and meaning. All are optional unless the meaning begins with `Needed`.
    pub query: &'static [(&'static str, &'static str)],
    pub takes: Body,
    pub gives: Body,
}

/// What a request or an answer carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    Nothing,
    /// JSON of this type.
    One(&'static str),
    /// A JSON array of this type.
    Many(&'static str),
    /// Any JSON object.
    Json,
    /// Bytes, streamed.
    Bytes,
}

use Body::{Bytes, Json, Many, Nothing, One};

const fn get(path: &'static str, summary: &'static str, gives: Body) -> Endpoint {
    Endpoint { method: "GET", path, summary, query: &[], takes: Nothing, gives }
}
const fn post(path: &'static str, summary: &'static str, takes: Body) -> Endpoint {
    Endpoint { method: "POST", path, summary, query: &[], takes, gives: One("Accepted") }
}
const fn delete(path: &'static str, summary: &'static str) -> Endpoint {
    Endpoint { method: "DELETE", path, summary, query: &[], takes: Nothing, gives: One("Accepted") }
}

pub const ENDPOINTS: &[Endpoint] = &[
    get("/v1/openapi.json", "This contract.", Json),
    get("/v1/status", "Everything at one look: headline, nodes, groups, VMs, witness.", One("Status")),
    get("/v1/nodes", "All nodes.", Many("Node")),
    get("/v1/nodes/{node}", "One node.", One("Node")),
    get(
        "/v1/nodes/{node}/confirm-token",
        "What to type to confirm that a node is down, and what may be lost by it.",
        One("ConfirmToken"),
    ),
    post(
        "/v1/nodes/{node}/confirm-down",
        "A human confirms that the node is down and can not act: the last resort.",
        One("ConfirmDown"),
    ),
    get("/v1/vms", "All VMs.", Many("Vm")),
    post("/v1/vms", "Create a VM with its disks.", One("CreateVm")),
    get("/v1/vms/{vm}", "One VM.", One("Vm")),
    delete("/v1/vms/{vm}", "Delete a stopped VM and its disks."),
    post("/v1/vms/{vm}/start", "Have it running.", Nothing),
    post("/v1/vms/{vm}/shutdown", "Have it stopped: the guest is asked to shut down.", Nothing),
    post("/v1/vms/{vm}/stop", "Have it stopped: it is ended at once.", Nothing),
    get("/v1/vms/{vm}/why", "The events that made the VM's state what it is.", Many("Event")),
    get(
        "/v1/vms/{vm}/console",
        "The serial console: what was kept of the past, then what follows, until the client goes away. Redirects (307) to \
         the node that runs the VM.",
        Bytes,
    ),
    Endpoint {
        method: "POST",
        path: "/v1/vms/{vm}/console",
        summary: "Type into the serial console. Redirects (307) to the node that runs the VM.",
        query: &[],
        takes: Bytes,
        gives: Nothing,
    },
    get("/v1/volumes", "All volumes.", Many("Volume")),
    post("/v1/volumes", "Create a volume of its own group.", One("CreateVolume")),
    get("/v1/volumes/{volume}", "One volume.", One("Volume")),
    delete("/v1/volumes/{volume}", "Delete a volume that belongs to no VM and no image."),
    post(
        "/v1/volumes/{volume}/scrub",
        "Read it on every replica and compare them, now or every so many days.",
        One("ScrubVolume"),
    ),
    post("/v1/volumes/{volume}/export", "Offer it over NBD, or cease to.", One("ExportVolume")),
    post("/v1/vms/{vm}/snapshot", "Freeze all its disks at one point of the stream of writes.", One("CreateSnapshot")),
    post("/v1/volumes/{volume}/snapshot", "Freeze it at one point of the stream of writes.", One("CreateSnapshot")),
    post(
        "/v1/groups/{group}/snapshot",
        "Freeze its volumes at one point of the stream of writes.",
        One("CreateSnapshot"),
    ),
    post(
        "/v1/volumes/{volume}/clone",
        "A new volume that begins as a copy of this one of a snapshot.",
        One("CloneSnapshot"),
    ),
    post("/v1/volumes/{volume}/resize", "Let it grow, while it is used.", One("ResizeVolume")),
    get("/v1/snapshots", "All snapshots.", Many("Snapshot")),
    get("/v1/snapshots/{snapshot}", "One snapshot, by `OWNER@NAME` or id.", One("Snapshot")),
    Endpoint {
        method: "GET",
        path: "/v1/snapshots/{snapshot}/diff",
        summary: "In which bytes another snapshot of the same volumes differs. Redirects (307) to a node that has both.",
        query: &[("to", "Needed: the other snapshot.")],
        takes: Nothing,
        gives: One("SnapshotDiff"),
    },
    delete("/v1/snapshots/{snapshot}", "Delete a snapshot."),
    post(
        "/v1/snapshots/{snapshot}/rollback",
        "What it is of holds again what it holds; nobody may be using it.",
        Nothing,
    ),
    post(
        "/v1/snapshots/{snapshot}/clone",
        "A new VM whose disks begin as copies of this snapshot.",
        One("CloneSnapshot"),
    ),
    get("/v1/images", "All images.", Many("Image")),
    Endpoint {
        method: "POST",
        path: "/v1/images",
        summary: "Upload an image of any format that qemu-img reads.",
        query: &[
            ("name", "Needed: the new image's name."),
            ("format", "Format of the bytes; found out when not given."),
            ("encrypted", "true: what is stored of it is encrypted."),
        ],
        takes: Bytes,
        gives: One("Accepted"),
    },
    get("/v1/images/{image}", "One image.", One("Image")),
    delete("/v1/images/{image}", "Delete an image. VMs made from it keep their disks."),
    get("/v1/groups", "All groups.", Many("Group")),
    get("/v1/groups/{group}", "One group.", One("Group")),
    post("/v1/groups/{group}/mode", "When a replica counts as having a write: sync, memory or async.", One("SetMode")),
    post("/v1/groups/{group}/lag", "How far trailing replicas may be behind, and what happens then.", One("SetLag")),
    post("/v1/groups/{group}/replicas", "One more node carries a replica.", One("AddReplica")),
    delete("/v1/groups/{group}/replicas/{node}", "Remove a replica; its space is free."),
    post("/v1/groups/{group}/move", "Have a replica on another node.", One("MoveReplica")),
    post("/v1/groups/{group}/cancel-move", "Leave both replicas of a move where they are.", Nothing),
    get(
        "/v1/groups/{group}/promote-token",
        "What to type to make the answering node's trailing replica the truth, and what is lost by it.",
        One("PromoteToken"),
    ),
    post(
        "/v1/groups/{group}/promote",
        "A human makes the answering node's trailing replica the truth.",
        One("Promote"),
    ),
    get(
        "/v1/kept",
        "What nodes keep of replicas that are or were overwritten, as far as they are heard of.",
        Many("Kept"),
    ),
    get("/v1/pools/{node}/kept/{kept}", "One of them. Redirects (307) to the node.", One("Kept")),
    post(
        "/v1/pools/{node}/kept/{kept}/export",
        "Offer it over NBD, to be read, or cease to; until the node's `noded` is restarted. Redirects (307) to the node.",
        One("ExportVolume"),
    ),
    delete("/v1/pools/{node}/kept/{kept}", "Delete it for good. Redirects (307) to the node."),
    get("/v1/pools", "The pools of all nodes.", Many("Pool")),
    get("/v1/pools/{node}", "The pool of one node, with its disks.", One("Pool")),
    post(
        "/v1/pools/{node}/verify",
        "Verify the pool's metadata while it is used; a run under way begins anew. Redirects (307) to the node.",
        Nothing,
    ),
    get(
        "/v1/pools/{node}/verify",
        "What the verification that was asked for last has found so far. Redirects (307) to the node.",
        One("PoolVerification"),
    ),
    post(
        "/v1/pools/{node}/disks",
        "A disk joins the node's pool. `409` when it is in use, not blank, too small, or belongs to a pool. Redirects (307) to the node.",
        One("AddDisk"),
    ),
    delete(
        "/v1/pools/{node}/disks/{disk}",
        "Take a drained disk out of the pool, or forget one that failed. `409` while it holds anything. Redirects (307) to the node.",
    ),
    post(
        "/v1/pools/{node}/disks/{disk}/drain",
        "Move what is on the disk to the others. `409` when they have no room for it. Redirects (307) to the node.",
        Nothing,
    ),
    post(
        "/v1/pools/{node}/disks/{disk}/undrain",
        "Use a disk again that was to be drained. Redirects (307) to the node.",
        Nothing,
    ),
    post(
        "/v1/pools/{node}/disks/{disk}/let-go",
        "Give up a missing disk for good; what was on it comes from the other replicas. `403` when no other replica in sync has it. \
         Redirects (307) to the node.",
        One("LetGoDisk"),
    ),
    Endpoint {
        method: "GET",
        path: "/v1/events",
        summary: "What happened, oldest first.",
        query: &[
            ("since", "Only events with a greater index."),
            ("limit", "At most so many, the newest; 1000 if not given."),
        ],
        takes: Nothing,
        gives: Many("Event"),
    },
    get("/v1/tasks", "Requests that this node has taken, newest first.", Many("Task")),
    Endpoint {
        method: "GET",
        path: "/v1/tasks/{task}",
        summary: "One task; waits for its end if asked to.",
        query: &[("wait_ms", "Answer when the task has ended, or after this time (at most 30000).")],
        takes: Nothing,
        gives: One("Task"),
    },
    get(
        "/v1/master-key",
        "Which nodes have which master key, and which volumes' keys are sealed under which.",
        One("MasterKeys"),
    ),
    post(
        "/v1/master-key/rotate",
        "Seal all volumes' keys anew under the successor of the master key, which every node must have.",
        Nothing,
    ),
    get("/v1/witness", "The witness as the answering node last saw it; null without one.", One("Witness")),
];
