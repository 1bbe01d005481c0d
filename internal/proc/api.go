package proc

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/unum-os/unum/internal/control/api"
	"github.com/unum-os/unum/internal/errs"
	"github.com/unum-os/unum/internal/ids"
)

// listPart is how many bytes of jobs one message of a list holds at least, but
// for the last: far below what a message may hold, with the longest job there is.
const listPart = 1 << 20

// jobsAPI is the service Jobs of the control API.
type jobsAPI struct {
	api.UnimplementedJobsServer
	h *Home
}

func (a *jobsAPI) List(req *api.ListJobsRequest, out grpc.ServerStreamingServer[api.ListJobsResponse]) error {
	ps := a.h.PS(out.Context(), req.All)
	part, size := &api.ListJobsResponse{}, 0
	for i := range ps.Jobs {
		j := apiJob(&ps.Jobs[i])
		part.Jobs = append(part.Jobs, j)
		if size += proto.Size(j); size < listPart {
			continue
		}
		if err := out.Send(part); err != nil {
			return err
		}
		part, size = &api.ListJobsResponse{}, 0
	}
	part.RecordProblem = api.Text(ps.Record)
	for _, n := range ps.Silent {
		part.Silent = append(part.Silent, uint64(n))
	}
	return out.Send(part)
}

func (a *jobsAPI) Kill(ctx context.Context, req *api.KillRequest) (*api.KillResponse, error) {
	if req.Signal < 0 || req.Signal > 64 {
		return nil, errs.E(errs.Invalid, "", "", "signal %d: want 0 to 64", req.Signal)
	}
	return &api.KillResponse{}, a.h.Kill(ctx, ids.Job(req.Job), int(req.Signal), api.Peer(ctx).UID)
}

func (a *jobsAPI) Wait(ctx context.Context, req *api.WaitRequest) (*api.WaitResponse, error) {
	rec, err := a.h.Wait(ctx, ids.Job(req.Job))
	if err != nil {
		return nil, err
	}
	return &api.WaitResponse{Job: apiJob(&JobInfo{Record: rec, CPU: rec.CPU})}, nil
}

func (a *jobsAPI) Logs(req *api.LogsRequest, out grpc.ServerStreamingServer[api.LogsResponse]) error {
	return a.h.Logs(out.Context(), ids.Job(req.Job), api.Peer(out.Context()).UID, req.Follow, func(fd int, data []byte) error {
		return out.Send(&api.LogsResponse{Fd: int32(fd), Data: data})
	})
}

func (a *jobsAPI) Why(ctx context.Context, req *api.WhyRequest) (*api.WhyResponse, error) {
	text, err := a.h.Why(ctx, ids.Job(req.Job), req.Json)
	return &api.WhyResponse{Text: api.Text(text)}, err
}

// apiJob is a job as the API shows it.
func apiJob(j *JobInfo) *api.Job {
	r := &j.Record
	p := &api.Job{
		Id: uint64(r.Job), Incarnation: uint64(r.Incarnation), Home: uint64(r.Home), Node: uint64(r.Node),
		Uid: r.UID, Argv: r.Argv, Cwd: r.Cwd, State: api.Job_State(r.State), Code: int32(r.Code), Signal: int32(r.Signal),
		Detached: r.Detached, Name: api.Text(r.Name), Start: timestamppb.New(time.Unix(0, r.Start)),
		Cpu: durationpb.New(time.Duration(j.CPU)), RssBytes: j.RSS, Text: api.Text(r.Text),
	}
	if r.End != 0 {
		p.End = timestamppb.New(time.Unix(0, r.End))
	}
	return p
}

// RecordOf returns the part of a job's record that the API shows.
func RecordOf(p *api.Job) JobRecord {
	r := JobRecord{
		Job: ids.Job(p.Id), Incarnation: ids.Incarnation(p.Incarnation), Home: ids.Node(p.Home), Node: ids.Node(p.Node),
		UID: p.Uid, Argv: p.Argv, Cwd: p.Cwd, State: State(p.State), Code: int(p.Code), Signal: int(p.Signal),
		Detached: p.Detached, Name: p.Name, CPU: int64(p.Cpu.AsDuration()), Text: p.Text,
	}
	if p.Start != nil {
		r.Start = p.Start.AsTime().UnixNano()
	}
	if p.End != nil {
		r.End = p.End.AsTime().UnixNano()
	}
	return r
}
