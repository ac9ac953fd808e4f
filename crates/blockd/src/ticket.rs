//! What an operation of the reactor was for, as its token.

use pollux_host::reactor::Token;

/// Ids count up and are never used again while the daemon runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ticket {
    Signal,
    Disk,
    Keeper,
    OrdersAccept,
    OrdersReceive(u64),
    OrdersSend(u64),
    ClientAccept(u64),
    ClientReceive(u64),
    ClientSend(u64),
    LinkAccept(u64),
    LinkConnect(u64),
    LinkReceive(u64),
    LinkSend(u64),
}

impl Ticket {
    pub fn token(self) -> Token {
        let (kind, id) = match self {
            Ticket::Signal => (0, 0),
            Ticket::Disk => (1, 0),
            Ticket::OrdersAccept => (2, 0),
            Ticket::OrdersReceive(id) => (3, id),
            Ticket::OrdersSend(id) => (4, id),
            Ticket::ClientAccept(id) => (5, id),
            Ticket::ClientReceive(id) => (6, id),
            Ticket::ClientSend(id) => (7, id),
            Ticket::LinkAccept(id) => (8, id),
            Ticket::LinkConnect(id) => (9, id),
            Ticket::LinkReceive(id) => (10, id),
            Ticket::LinkSend(id) => (11, id),
            Ticket::Keeper => (12, 0),
        };
        Token(id << 8 | kind)
    }

    pub fn of(token: Token) -> Ticket {
        let id = token.0 >> 8;
        match token.0 & 0xff {
            0 => Ticket::Signal,
            1 => Ticket::Disk,
            2 => Ticket::OrdersAccept,
            3 => Ticket::OrdersReceive(id),
            4 => Ticket::OrdersSend(id),
            5 => Ticket::ClientAccept(id),
            6 => Ticket::ClientReceive(id),
            7 => Ticket::ClientSend(id),
            8 => Ticket::LinkAccept(id),
            9 => Ticket::LinkConnect(id),
            10 => Ticket::LinkReceive(id),
            11 => Ticket::LinkSend(id),
            12 => Ticket::Keeper,
            kind => panic!("a token of kind {kind} was never given"),
        }
    }
}
