//! Uploads: bytes are spooled to disk, looked at, and copied into a new mirrored volume.

use super::Refused;
use super::routes::{Api, ImageQuery};
use super::tasks;
use crate::fill;
use crate::fill::ImageFile;
use axum::body::Body;
use http_body_util::BodyExt;
use pollux_api::{Accepted, ApiError, ErrorCode, Task};
use pollux_base::unit::{BLOCK_BYTES, VOLUME_BYTES_MAX};
use pollux_base::{ByteCount, ImageId};
use pollux_cluster::{Answer, Change};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

/// An upload that sends nothing for this long is given up.
const PIECE_TIMEOUT: Duration = Duration::from_secs(60);
/// The new volume's primary is this node; until its data plane serves it, the copy is tried again.
const COPY_ATTEMPTS: u32 = 5;
const COPY_PAUSE: Duration = Duration::from_secs(1);

/// A spooled file; removed when it is no longer needed.
struct Spooled {
    path: PathBuf,
    sha256: String,
}

impl Drop for Spooled {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Where uploads are kept until they are copied.
pub fn spool_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("spool")
}

/// Empties the spool of what an earlier process left.
pub fn clear_spool(state_dir: &Path) -> std::io::Result<()> {
    let dir = spool_dir(state_dir);
    match std::fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::create_dir_all(&dir)
}

/// Takes an upload; answers when the bytes are here and look like an image, and its volume is made.
pub async fn upload(api: Arc<Api>, query: ImageQuery, body: Body) -> Result<Accepted, Refused> {
    let Ok(_place) = api.uploads.clone().try_acquire_owned() else {
        return Err(Refused(ApiError::new(ErrorCode::TooMuch, "too many uploads are under way already")));
    };
    // Refused before gigabytes have travelled; the entry decides again.
    let name = query.name.clone();
    let taken = api.core.ask(move |cluster| cluster.state().image_named(&name).is_some()).await?;
    if taken {
        return Err(Refused(ApiError::new(ErrorCode::Conflict, format!("there is an image `{}` already", query.name))));
    }
    let spooled = spool(&api, body).await?;
    let file = fill::look_at(&spooled.path, query.format.as_deref()).await.map_err(|reason| {
        ApiError::new(ErrorCode::Invalid, format!("the upload can not be used as an image: {reason}"))
            .with_hint("Look at it with `qemu-img info`.")
    })?;
    let size = ByteCount(file.size.0.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES));
    if size.0 > VOLUME_BYTES_MAX {
        return Err(Refused(ApiError::new(
            ErrorCode::Invalid,
            format!("an image of {} bytes is too large", file.size.0),
        )));
    }
    let key = api.make_key_if(query.encrypted).await?;
    let change = Change::CreateImage { name: query.name.clone(), size, node: api.config.node, key };
    let created = api.core.change(change).await?;
    let Answer::Created { id } = created else {
        return Err(Refused(ApiError::new(ErrorCode::Internal, "the image has no id")));
    };
    let task = api.tasks.begin("image import", &query.name, Some(id))?;
    let name = task.borrow().task.clone();
    tokio::spawn(finish(api.clone(), task, ImageId(id), query.name, spooled, file));
    Ok(Accepted { task: name, id: Some(id) })
}

async fn spool(api: &Api, mut body: Body) -> Result<Spooled, Refused> {
    let path = spool_dir(&api.config.state_dir).join(format!("{}-{}", std::process::id(), api.next_spool()));
    let mut spooled = Spooled { path, sha256: String::new() };
    let failed = |error: std::io::Error| {
        ApiError::new(ErrorCode::Internal, format!("the upload can not be kept: {error}"))
            .with_hint("Is there room in the node's state directory?")
    };
    let mut file = tokio::fs::File::create_new(&spooled.path).await.map_err(failed)?;
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut len = 0u64;
    loop {
        let frame = tokio::time::timeout(PIECE_TIMEOUT, body.frame()).await;
        let broken = |reason: String| ApiError::new(ErrorCode::Invalid, format!("the upload was broken off: {reason}"));
        let frame = match frame {
            Err(_) => return Err(Refused(broken(format!("nothing came for {PIECE_TIMEOUT:?}")))),
            Ok(None) => break,
            Ok(Some(Err(error))) => return Err(Refused(broken(error.to_string()))),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(bytes) = frame.into_data() else { continue };
        len += bytes.len() as u64;
        if len > VOLUME_BYTES_MAX {
            return Err(Refused(ApiError::new(ErrorCode::TooMuch, "the upload is larger than the largest volume")));
        }
        digest.update(&bytes);
        file.write_all(&bytes).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    if len == 0 {
        return Err(Refused(ApiError::new(ErrorCode::Invalid, "the upload is empty")));
    }
    spooled.sha256 = digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(spooled)
}

/// Copies the spooled file into the image's volume and says that it can be used. What can not be filled is deleted.
async fn finish(
    api: Arc<Api>,
    task: watch::Sender<Task>,
    image: ImageId,
    name: String,
    spooled: Spooled,
    file: ImageFile,
) {
    task.send_modify(|task| task.detail = "its bytes are copied into the pool".into());
    let export = api.core.ask(move |cluster| {
        let state = cluster.state();
        let image = state.images.get(&image)?;
        state.volumes.get(&image.volume).map(|volume| volume.name.clone())
    });
    let mut result = match export.await {
        Ok(Some(export)) => copy(&api, &spooled, &file, &export).await,
        Ok(None) => Err("it was deleted meanwhile".into()),
        Err(error) => Err(error.error),
    };
    if result.is_ok() {
        let ready = Change::ImageReady { image, sha256: spooled.sha256.clone() };
        result = api.core.change(ready).await.map(|_| ()).map_err(|error| error.error);
    }
    match result {
        Ok(()) => tasks::look_after(task, tasks::Goal::ImageReady(image), api.core.clone()).await,
        Err(reason) => {
            tracing::warn!(%image, name, "was not filled: {reason}");
            let _ = api.core.change(Change::DeleteImage { image }).await;
            tasks::fail(&task, ApiError::new(ErrorCode::Internal, format!("the image was not filled: {reason}")));
        }
    }
}

async fn copy(api: &Api, spooled: &Spooled, file: &ImageFile, export: &str) -> Result<(), String> {
    let mut result = Ok(());
    for attempt in 0..COPY_ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(COPY_PAUSE).await;
        }
        result = fill::copy_file(&api.config, &spooled.path, &file.format, export).await;
        if result.is_ok() {
            break;
        }
    }
    result
}
