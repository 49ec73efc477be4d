//! A WebSocket client that is independent of this project: tungstenite on a tokio socket.
//!
//! Every wait has a bound.

use std::net::Ipv4Addr;
use std::panic::Location;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::{Request, Response as HttpResponse};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::server::Endpoint;
use crate::transport::{Stream, Transport};
use crate::wait::within_timeout;

/// A client that knows WebSockets and nothing about hubs.
#[derive(Debug)]
pub struct Client<S = Stream> {
    /// For what the methods do not do.
    pub socket: WebSocketStream<S>,
}

impl Client {
    /// Connects to a WebSocket; to one over TLS (`wss://`) if its server is of this process.
    #[track_caller]
    pub fn connect(url: impl AsRef<str>) -> impl Future<Output = Self> {
        let url = url.as_ref().to_owned();
        let connected = within_timeout(Self::try_connect(url, &[]));
        async move { connected.await.unwrap().0 }
    }

    /// Connects with these headers beside those of the handshake; returns the response, too.
    pub async fn try_connect(
        url: String,
        headers: &[(&'static str, &str)],
    ) -> Result<(Self, HttpResponse<Option<Vec<u8>>>), tungstenite::Error> {
        let mut request = url.into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let address = request.uri().authority().unwrap().as_str();
        let stream = TcpStream::connect(address).await.unwrap();
        let is_tls = request.uri().scheme_str() == Some(Transport::Tls.scheme());
        Self::shake_hands(if is_tls { Transport::Tls } else { Transport::Plain }, request, stream).await
    }

    /// Connects to the path `/ws` from another address of this machine.
    pub async fn try_connect_from(
        from: Ipv4Addr,
        to: impl Into<Endpoint>,
    ) -> Result<(Self, HttpResponse<Option<Vec<u8>>>), tungstenite::Error> {
        let Endpoint { transport, address } = to.into();
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        let stream = socket.connect(address).await.unwrap();
        let request = format!("{}://{address}/ws", transport.scheme()).into_client_request().unwrap();
        Self::shake_hands(transport, request, stream).await
    }

    async fn shake_hands(
        transport: Transport,
        request: Request<()>,
        stream: TcpStream,
    ) -> Result<(Self, HttpResponse<Option<Vec<u8>>>), tungstenite::Error> {
        let stream = transport.connect_on(stream).await.unwrap();
        let (socket, response) = tokio_tungstenite::client_async(request, stream).await?;
        Ok((Self { socket }, response))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// On a stream whose handshake is done.
    pub async fn upgraded(stream: S) -> Self {
        Self { socket: WebSocketStream::from_raw_socket(stream, Role::Client, None).await }
    }

    /// Sends a text message.
    #[track_caller]
    pub fn send_text(&mut self, text: impl Into<String>) -> impl Future<Output = ()> {
        let sent = within_timeout(self.socket.send(Message::text(text.into())));
        async move { sent.await.unwrap() }
    }

    /// Sends any message.
    #[track_caller]
    pub fn send(&mut self, message: Message) -> impl Future<Output = ()> {
        let sent = within_timeout(self.socket.send(message));
        async move { sent.await.unwrap() }
    }

    /// The next message that is neither ping nor pong; none at the end of the stream, whatever ends it.
    #[track_caller]
    pub fn recv(&mut self) -> impl Future<Output = Option<Message>> {
        within_timeout(async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(message)) => return Some(message),
                    Some(Err(_)) | None => return None,
                }
            }
        })
    }

    /// The next message, which must be a text.
    #[track_caller]
    pub fn recv_text(&mut self) -> impl Future<Output = String> {
        let caller = Location::caller();
        let next = self.recv();
        async move {
            match next.await {
                Some(Message::Text(text)) => text.to_string(),
                other => panic!("no text but {other:?} at {caller}"),
            }
        }
    }

    /// The next messages, which must be these texts.
    #[track_caller]
    pub fn recv_texts(&mut self, texts: &[&str]) -> impl Future<Output = ()> {
        let caller = Location::caller();
        async move {
            for text in texts {
                assert_eq!(self.recv_text().await, *text, "at {caller}");
            }
        }
    }

    /// Reads to the end of the stream: all texts, and the code and reason of the Close frame.
    #[track_caller]
    pub fn rest(mut self) -> impl Future<Output = (Vec<String>, Option<(u16, String)>)> {
        within_timeout(async move {
            let (mut texts, mut close) = (Vec::new(), None);
            while let Some(message) = self.recv().await {
                match message {
                    Message::Text(text) => texts.push(text.to_string()),
                    Message::Close(frame) => {
                        assert!(close.is_none(), "two Close frames");
                        close = Some(frame.map_or((1005, String::new()), |frame| {
                            (frame.code.into(), frame.reason.to_string())
                        }));
                    }
                    _ => {}
                }
            }
            (texts, close)
        })
    }

    /// Waits for the server's Close frame, before which no text may come; its code and reason.
    #[track_caller]
    pub fn closed(self) -> impl Future<Output = (u16, String)> {
        let caller = Location::caller();
        let rest = self.rest();
        async move {
            let (texts, close) = rest.await;
            assert!(texts.is_empty(), "{texts:?} came before the end at {caller}");
            close.unwrap_or_else(|| panic!("no Close frame at {caller}"))
        }
    }

    /// Sends a Close frame and reads to the end of the stream: all texts.
    pub async fn leave(mut self) -> Vec<String> {
        self.send_close(1000).await;
        self.rest().await.0
    }

    /// Sends a Close frame.
    pub async fn send_close(&mut self, code: u16) {
        let frame = CloseFrame { code: code.into(), reason: "".into() };
        within_timeout(self.socket.send(Message::Close(Some(frame)))).await.unwrap();
    }
}
