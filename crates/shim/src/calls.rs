//! The Task API as it is served: what changes something is done to the end, whatever
//! becomes of the caller.
//!
//! The server drops a call whose connection has broken, wherever it stands, and containerd
//! may be killed at any moment: a program would run that nobody knows of, or a container
//! be gone by half. A container that is being created is another matter, since nobody would
//! ask for it: it goes, see [`TaskService::create`].

use std::{convert::Infallible, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
        StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
        UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::Task,
};
use tokio::sync::oneshot;
use ttrpc::{Code, r#async::TtrpcContext, get_status};
use walnut_sandbox::Doing;

use crate::service::{Reply, TaskService};

/// The calls of a [`TaskService`].
#[derive(Debug)]
pub(crate) struct Calls(Arc<TaskService>);

impl Calls {
    pub(crate) fn new(service: Arc<TaskService>) -> Self {
        Self(service)
    }
}

async fn to_the_end<T: Send + 'static>(
    doing: Doing,
    call: impl Future<Output = Reply<T>> + Send + 'static,
) -> Reply<T> {
    let whole = async move {
        let reply = call.await;
        drop(doing);
        reply
    };
    tokio::spawn(whole).await.unwrap_or_else(|e| {
        let status = get_status(Code::INTERNAL, format!("answer a call: {e}"));
        Err(ttrpc::Error::RpcStatus(status))
    })
}

/// Calls that change something, and calls that ask or wait.
macro_rules! calls {
    (whole { $($whole:ident($wants:ty) -> $gives:ty;)* } open { $($open:ident($asks:ty) -> $gets:ty;)* }) => {
        #[async_trait]
        impl Task for Calls {
            async fn create(
                &self,
                _: &TtrpcContext,
                req: CreateTaskRequest,
            ) -> Reply<CreateTaskResponse> {
                let service = self.0.clone();
                // Goes with this call, finished or not.
                let (_here, gone) = oneshot::channel::<Infallible>();
                let doing = service.busy.with("a container is being created");
                to_the_end(doing, async move { service.create(req, gone).await }).await
            }
            $(async fn $whole(&self, _: &TtrpcContext, req: $wants) -> Reply<$gives> {
                let service = self.0.clone();
                let doing = service.busy.with(concat!(stringify!($whole), " is being done"));
                to_the_end(doing, async move { service.$whole(req).await }).await
            })*
            $(async fn $open(&self, _: &TtrpcContext, req: $asks) -> Reply<$gets> {
                self.0.$open(req).await
            })*
        }
    };
}

calls! {
    whole {
        start(StartRequest) -> StartResponse;
        exec(ExecProcessRequest) -> Empty;
        kill(KillRequest) -> Empty;
        pause(PauseRequest) -> Empty;
        resume(ResumeRequest) -> Empty;
        update(UpdateTaskRequest) -> Empty;
        delete(DeleteRequest) -> DeleteResponse;
        checkpoint(CheckpointTaskRequest) -> Empty;
        shutdown(ShutdownRequest) -> Empty;
    }
    open {
        state(StateRequest) -> StateResponse;
        wait(WaitRequest) -> WaitResponse;
        pids(PidsRequest) -> PidsResponse;
        stats(StatsRequest) -> StatsResponse;
        connect(ConnectRequest) -> ConnectResponse;
        resize_pty(ResizePtyRequest) -> Empty;
        close_io(CloseIORequest) -> Empty;
    }
}
